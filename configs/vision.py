"""Weak-to-strong on images: a weak network labels, linear probes on a strong network's features learn from its labels.

    python -m w2s_jax.main --config=vision:resnet50 --config.data_dir=/data/imagenet --workdir=runs/vision-rn50
    python -m w2s_jax.main --config=vision:vitb8 --config.data_dir=/data/imagenet --workdir=runs/vision-vitb8
    python -m w2s_jax.main --config=vision:quick --workdir=runs/vision-quick

openai/weak-to-strong `vision/` (commit 6b450f2): AlexNet's soft labels for 40,000 images of ImageNet's validation set, probes on DINO's
features of them (Adam 1e-3, batch 100, cosine, no decay), 10,000 images to test on. `data_dir` holds ILSVRC2012_img_val.tar and
ILSVRC2012_devkit_t12.tar.gz. Published top-1 accuracies, which these two presets are for:

    preset      weak (AlexNet)    ceiling    student    PGR
    resnet50    56.6              64.5       61.9       .67     20 epochs
    vitb8       56.6              74.0       66.6       .57     5 epochs

`:quick` needs no network and takes about two minutes on two cores: scikit-learn's digits. The weak network, a vision transformer of
width 16, learns from 200 images and labels; the strong one, of width 96, is pretrained without labels by our own code on the images that
are not in the test part (SimCLR), and its probes learn from labels of 997 images. Test accuracies on 600 images, means over three seeds,
PGR with its 95% interval; every setting was chosen on other splits and seeds:

    weak .718                 ceiling    student    PGR
    probe xent                .976       .863       .56 [.47, .67]
    probe logconf             .976       .912       .75 [.68, .82]
    probe adaptconf           .976       .892       .68 [.59, .75]
    probe converged           .967       .812       .38 [.22, .53]    l2 by the loss on held-out labels
    fine-tuned xent           .977       .836       .45 [.37, .56]
    fine-tuned logconf        .977       .772       .21 [.02, .38]
    fine-tuned adaptconf      .977       .831       .44 [.25, .60]

`:runlocal` is a smoke run of the same.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from w2s_jax.config import shipped


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.stage = "vision"  # which stage of w2s_jax runs this config
    c.seeds = (0, 1, 2)  # initial weights and order of the probes, and of the networks that are trained here
    c.data_seed = 0  # which images are weak, train and test

    # Models
    c.weak_model = "alexnet"  # a published name, a .pth file, a folder or a hub id, with its classifier; empty = trained by weak_train
    c.weak_revision = "main"  # branch, tag or commit of a hub model
    c.strong_model = "dino_resnet50"  # the same, its features; empty = trained by strong_train
    c.strong_revision = "main"  # branch, tag or commit of a hub model
    c.dtype = "float32"  # compute: float32 | bfloat16
    c.matmul_precision = "default"  # default | high | highest (default may mean TF32 or bfloat16 passes on an accelerator)

    # Images
    c.dataset = "imagenet"  # digits | imagenet | a folder or tar of class folders | tfds:NAME | hf:ID or hf:/folder
    c.data_dir = ""  # of imagenet (validation tar and devkit) and tfds
    c.dataset_split = ""  # split of a folder with split folders, of tfds or hf
    c.classes = ""  # of a folder: a file, or a,b,c, of class names in the order of the labels; empty = sorted folder names
    c.bad_images = "error"  # what cannot be decoded: error | skip (left out, counted and named)
    c.n_weak = 0  # images set apart for weak_train
    c.n_train = 40_000  # images that probes are fitted to; 0 = what the others leave
    c.n_test = 0  # images of all accuracies; 0 = what the others leave
    c.resize = -1  # pixels of the shorter side; 0 = as it is, -1 = each model's own
    c.crop = -1  # pixels a side of the central square; 0 = the whole image, -1 = each model's own
    c.interpolation = "auto"  # auto (each model's own) | bilinear | bicubic

    # Probes
    c.losses = ("xent",)  # of students, by name; ceilings take xent
    c.loss_args = ConfigDict()  # arguments of the losses; unset = the loss's own default
    c.loss_args.alpha = placeholder(float)  # product (1)
    c.loss_args.beta = placeholder(float)  # product (1)
    c.loss_args.aux_coef = placeholder(float)  # logconf*, entropy (0.5)
    c.loss_args.warmup = placeholder(float)  # logconf (0.2), logconf_openai (0.1) of training; entropy (100) updates
    c.loss_args.radius = placeholder(object)  # window: a number (0.15) or midweak
    c.loss_args.temperature = placeholder(float)  # adaptconf
    c.epochs = 20  # passes over the train part
    c.batch_size = 100  # images a step
    c.learning_rate = 1e-3  # Adam's
    c.schedule = "cosine"  # constant | cosine
    c.weight_decay = 0.0  # torch.optim.Adam's: l2 in the gradient
    c.l2 = ()  # penalties of probes that are fitted to convergence, largest first; chosen on labels held out; empty = none
    c.noise = ()  # shares of the true labels that are replaced at random, for probes to be compared with; empty = none

    # Networks that are trained here, by the stage vision_train (data, dtype and devices are those above)
    c.finetune = False  # a student (with each of losses) and a ceiling by student_train, all of the strong network's parameters
    c.weak_train = shipped("vision_train")  # the weak network, one a seed, on the weak part; where weak_model is empty
    c.strong_train = shipped("vision_train")  # the strong network, on the weak and train parts; where strong_model is empty
    c.student_train = shipped("vision_train")  # fine-tuning of the strong network; where finetune is set
    c.weak_train.split = "weak"
    c.strong_train.split = "both"
    c.strong_train.objective = "contrastive"
    c.student_train.learning_rate = 1e-4

    # Running
    c.pictures = 24  # test images in the report, with true, weak and student labels; 0 = none
    c.features = ""  # where labels' logits and features are kept; empty = <workdir>/features
    c.predictions = True  # write every probe's test predictions: 8 bytes x classes x images each
    c.eval_batch_size = 0  # images a forward pass; 0 = by their size
    c.workers = 0  # threads that decode images; 0 = the cores
    c.mesh = ConfigDict()  # devices along each axis; -1 = all that are left
    c.mesh.data = -1  # replicas
    c.mesh.fsdp = 1  # parameters and batch split
    c.mesh.model = 1  # tensors split

    if arg in ("resnet50", "vitb8"):
        c.interpolation = "bilinear"  # of the reference's transform, for both networks; DINO's own is bicubic
        c.matmul_precision = "highest"
        if arg == "vitb8":
            c.strong_model, c.epochs = "dino_vitb8", 5
    elif arg in ("quick", "runlocal"):
        c.dataset, c.weak_model, c.strong_model = "digits", "", ""
        c.n_weak, c.n_train, c.n_test = 200, 997, 600
        c.batch_size, c.epochs, c.learning_rate = 32, 40, 3e-3
        c.losses, c.noise = ("xent", "logconf", "adaptconf"), (0.2, 0.4, 0.6)
        c.l2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
        c.finetune = True
        for part, sizes in (("weak_train", (16, 1, 2, 32)), ("strong_train", (96, 2, 2, 192))):
            c[part].arch.update(dict(zip(("width", "layers", "heads", "mlp"), sizes), patch=4))
        c.weak_train.update({"epochs": 60, "batch_size": 20, "learning_rate": 1e-2, "warmup_steps": 20})
        c.strong_train.update({"epochs": 100, "batch_size": 128, "learning_rate": 3e-3, "warmup_steps": 20, "optimizer": "adamw",
                               "weight_decay": 0.05})
        c.strong_train.contrast.temperature = 0.5
        c.strong_train.augment.update({"shift": 0.125, "zoom": 0.2, "rotate": 20.0, "contrast": 0.3, "noise": 0.05})
        # From a head of zeros, losses that harden the student's answer would begin with class 0 for every image, and adaptconf stay there.
        c.student_train.update({"epochs": 10, "learning_rate": 3e-4, "head_init": "normal"})
        if arg == "runlocal":
            c.seeds, c.losses, c.noise, c.l2, c.epochs = (0,), ("xent",), (), (), 4
            c.n_train, c.n_test, c.strong_train.epochs, c.strong_train.warmup_steps, c.weak_train.epochs = 256, 128, 4, 2, 10
            c.strong_train.arch.update({"width": 32, "layers": 2, "heads": 2, "mlp": 64})
            c.student_train.epochs = 2
    elif arg:
        raise ValueError(f"configs/vision.py takes ':resnet50', ':vitb8', ':quick' or ':runlocal', got ':{arg}'")
    return c
