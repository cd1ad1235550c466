"""Train an image model: a weak supervisor or a ceiling on ground truth, a student on labels, or a backbone without any labels.

    python -m w2s_jax.main --config=vision_train --config.model=dino_resnet50 --config.dataset=imagenet --config.data_dir=/data/imagenet \
        --config.n_train=40000 --workdir=runs/ceiling

`model` is the name of a published checkpoint (alexnet, resnet50, dino_resnet50, dino_vits16, dino_vits8, dino_vitb16, dino_vitb8,
dinov2_vits14 ...), a .pth file, or a folder or hub id in Hugging Face's format (ViT, ResNet, DINOv2); empty = a new vision transformer
by arch. objective=contrastive is SimCLR's pretraining (Chen et al. 2020) on images without labels. `stages/vision.py` runs this stage
for what its experiment needs. `:runlocal` is a smoke run on scikit-learn's digits.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "vision_train"  # which stage of w2s_jax runs this config
    c.seed = 0  # initialisation, order, augmentation and dropout
    c.data_seed = 0  # which images are weak, train and test

    # Model
    c.model = ""  # a published name, a .pth file, a folder or a hub id; empty = a new vision transformer by arch
    c.revision = "main"  # branch, tag or commit of a hub model; recorded as a commit hash
    c.arch = ConfigDict()  # a new vision transformer (not used where model is set)
    c.arch.width = 64  # of the hidden states
    c.arch.layers = 4  # blocks
    c.arch.heads = 4  # attention heads; they divide the width
    c.arch.mlp = 256  # width of the MLPs
    c.arch.patch = 2  # pixels a side of a patch
    c.dtype = "float32"  # compute: float32 | bfloat16
    c.param_dtype = "float32"  # parameters: float32 | bfloat16
    c.matmul_precision = "default"  # default | high | highest (default may mean TF32 or bfloat16 passes on an accelerator)
    c.remat = "none"  # rematerialisation: none | full | dots | dots_no_batch | nothing_saveable | everything_saveable
    c.train = "full"  # full | head; running statistics of batch normalisation stay as they are
    c.head_init = "zeros"  # zeros | normal | small: the new linear head on the model's features

    # Images
    c.dataset = "digits"  # digits | imagenet | a folder or tar of class folders | tfds:NAME | hf:ID or hf:/folder
    c.data_dir = ""  # of imagenet (validation tar and devkit) and tfds
    c.dataset_split = ""  # split of a folder with split folders, of tfds or hf
    c.classes = ""  # of a folder: a file, or a,b,c, of class names in the order of the labels; empty = sorted folder names
    c.bad_images = "error"  # what cannot be decoded: error | skip (left out, counted and named)
    c.split = "train"  # images trained on: weak | train | both
    c.n_weak = 0  # images set apart for a weak supervisor of one's own
    c.n_train = 1000  # images of the train part; 0 = what the others leave
    c.n_test = 0  # images of the test part; 0 = what the others leave
    c.resize = -1  # pixels of the shorter side; 0 = as it is, -1 = the model's own
    c.crop = -1  # pixels a side of the central square; 0 = the whole image, -1 = the model's own
    c.interpolation = "auto"  # auto (the model's own) | bilinear | bicubic
    c.labels = ""  # a label file of the train part; empty = ground truth

    # Objective
    c.objective = "supervised"  # supervised | contrastive
    c.loss = "xent"  # of supervised training: xent product logconf logconf_openai entropy window kl reverse_xent reverse_kl adaptconf
    c.loss_args = ConfigDict()  # arguments of the losses; unset = the loss's own default
    c.loss_args.alpha = placeholder(float)  # product (1)
    c.loss_args.beta = placeholder(float)  # product (1)
    c.loss_args.aux_coef = placeholder(float)  # logconf*, entropy (0.5)
    c.loss_args.warmup = placeholder(float)  # logconf (0.2), logconf_openai (0.1) of training; entropy (100) updates
    c.loss_args.buffer = placeholder(int)  # logconf_eleuther, of two classes (32)
    c.loss_args.chunk = placeholder(int)  # logconf_eleuther (0)
    c.loss_args.balance_batch = placeholder(bool)  # logconf_eleuther (False)
    c.loss_args.radius = placeholder(object)  # window: a number (0.15) or midweak
    c.loss_args.temperature = placeholder(float)  # adaptconf (0.5)
    c.contrast = ConfigDict()  # contrastive pretraining: a projector of one hidden layer, dropped afterwards
    c.contrast.width = 256  # of the projector's hidden layer
    c.contrast.outputs = 64  # of the projections that are compared
    c.contrast.temperature = 0.2  # of their similarities

    # Augmentation
    c.augment = ConfigDict()  # random changes of training images, each drawn from [-x, x]; 0 = none
    c.augment.shift = 0.0  # share of the side
    c.augment.zoom = 0.0  # share, for each axis
    c.augment.rotate = 0.0  # degrees
    c.augment.flip = False  # left and right exchanged with probability 1/2
    c.augment.brightness = 0.0  # share of 255
    c.augment.contrast = 0.0  # share, around the image's mean
    c.augment.noise = 0.0  # standard deviation, share of 255

    # Optimisation
    c.batch_size = 32  # images a step
    c.microbatch_size = 0  # images over all devices held in memory at once; 0 = the whole batch
    c.epochs = 2.0  # passes over the images
    c.shuffle = "epoch"  # order of the images: none | once | epoch
    c.learning_rate = 1e-3  # peak
    c.schedule = "cosine"  # constant | cosine | linear
    c.warmup_steps = 0  # linear warm-up from 0
    c.optimizer = "adam"  # adam adamw adafactor sgd lion adafactor_openai
    c.optimizer_args = ConfigDict()  # arguments of the optimizers; unset = the optimizer's own default
    c.optimizer_args.b1 = placeholder(float)  # adam, adamw, lion (0.9)
    c.optimizer_args.b2 = placeholder(float)  # adam, adamw (0.999), lion (0.99)
    c.optimizer_args.eps = placeholder(float)  # adam, adamw (1e-8)
    c.optimizer_args.momentum = placeholder(float)  # sgd (0)
    c.optimizer_args.mu_dtype = placeholder(str)  # adam, adamw, lion: first moments kept in float32 (the default) | bfloat16
    c.grad_clip = 0.0  # clip the global norm of the gradients; 0 = off
    c.weight_decay = 0.0  # decoupled; not on biases and norms
    c.dropout = 0.0  # in transformers: on embeddings and residual branches

    # Running
    c.log_every = 1  # steps between lines of metrics.jsonl
    c.eval_every = 0  # steps between evaluations of the test images; 0 = at the end only
    c.eval_batch_size = 0  # images a forward pass; 0 = by their size
    c.checkpoint_every = 500  # steps; 0 = at the end only
    c.keep = "params"  # checkpoints after the run: params | all (optimizer state too) | none
    c.steps_per_dispatch = 0  # steps in one call of the device; 0 = by the size of the model
    c.workers = 0  # threads that decode images; 0 = the cores
    c.mesh = ConfigDict()  # devices along each axis; -1 = all that are left
    c.mesh.data = -1  # replicas
    c.mesh.fsdp = 1  # parameters and batch split
    c.mesh.model = 1  # tensors split
    c.logger = "none"  # none | tensorboard | wandb

    if arg == "runlocal":
        c.arch.update({"width": 16, "layers": 1, "heads": 2, "mlp": 32, "patch": 4})
        c.n_train, c.n_test, c.epochs = 256, 128, 2
    elif arg:
        raise ValueError(f"configs/vision_train.py takes ':runlocal', got ':{arg}'")
    return c
