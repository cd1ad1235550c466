"""The command line of the image stages: what is wrong gets one line and leaves nothing behind; help; the smoke run."""

import re
from pathlib import Path

import pytest
import tinyvision
import torchfiles
from pictures import encoded, pixels
from tinyvision import keys_of, published_checkpoints  # noqa: F401 (the fixture `published`)

from w2s_jax import main as entry

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("fast_compiles")


def unexpected(root) -> str:
    torchfiles.save({"features.0.weight": torch.zeros(4, 3, 11, 11), "other": torch.zeros(2)}, root / "odd.pth", torchfiles.ZIP)
    return str(root / "odd.pth")


def surplus(root) -> str:
    from vision_reference import ResNet, randomize

    state = randomize(ResNet((1, 1), stem=8, inner=(8, 8), expansion=2, classes=0), 2).state_dict()
    torchfiles.save(dict(state) | {"layer1.0.extra": torch.zeros(2)}, root / "surplus.pth", torchfiles.ZIP)
    return str(root / "surplus.pth")


NEW = {"weak_model": "", "n_weak": 12, "n_train": 30}
WRONG = {  # keys beside those of `published`; parts of the line. A callable makes a file in the case's folder.
    "unknown loss": ({"losses": "xent,logcnf"}, "config.losses: 'logcnf'", "did you mean 'logconf'"),
    "loss of two classes": ({"losses": "logconf_eleuther"}, "config.losses: 'logconf_eleuther'", "data has 3"),
    "loss twice": ({"losses": "xent,xent"}, "config.losses", "names one twice"),
    "penalties that rise": ({"l2": "1e-3,1e-2"}, "config.l2: (0.001, 0.01)", "largest to the smallest"),
    "noise of 1": ({"noise": "0.2,1.0"}, "config.noise: 1.0", "above 0 and below 1"),
    "no seeds": ({"seeds": "()"}, "config.seeds: is empty"),
    "misspelt published name": ({"strong_model": "dino_resnet5"}, "config.strong_model", "did you mean 'dino_resnet50'"),
    "no such file": ({"strong_model": "/nowhere/strong.pth"}, "config.strong_model: '/nowhere/strong.pth', no such folder"),
    "hub id that cannot be had": ({"weak_model": "facebok/vit"}, "facebok/vit", "hub"),
    "unknown data set": ({"dataset": "imagnet"}, "imagnet"),
    "missing data_dir": ({"dataset": "imagenet"}, "data_dir=''", "ILSVRC2012_img_val.tar"),
    "data_dir without its files": ({"dataset": "imagenet", "data_dir": "/nowhere"}, "data_dir='/nowhere'"),
    "too many images": ({"n_train": 61}, "n_train=61", "has 60 images"),
    "both sides open": ({"n_train": 0}, "one of n_train and n_test may be 0"),
    "wrong class": ({"classes": "blue,green,rot"}, "classes", "red"),
    "classes that the model does not know": (
        {"classes": "blue,green,red,white"}, "config.weak_model", "gives 3 classes, the images have 4"),
    "supervisor without a classifier": (lambda root, own: {"weak_model": own["strong_model"]}, "config.weak_model", "has no classifier"),
    "strong file of something else": (lambda root, own: {"strong_model": unexpected(root)}, "odd.pth", "not a published"),
    "strong file with a surplus tensor": (lambda root, own: {"strong_model": surplus(root)}, "surplus.pth", "1 that nothing takes"),
    "images set apart for nobody": ({"weak_model": ""}, "config.n_weak: 0", "weak_train"),
    "model of a network": ({**NEW, "weak_train.model": "x"}, "config.weak_train.model: 'x'", "expected one of alexnet"),
    "model of a student": ({"finetune": True, "student_train.model": "x"}, "config.student_train.model: 'x' is set", "the experiment sets"),
    "data of a network": ({**NEW, "weak_train.n_train": 5}, "config.weak_train.n_train: 5 is set", "config.n_train of the experiment"),
    "loss of a student": ({"finetune": True, "student_train.loss": "logconf"}, "config.student_train.loss: 'logconf'"),
    "part of a student": ({"finetune": True, "student_train.split": "both"}, "config.student_train.split: 'both'", "expected train"),
    "supervisor without labels": ({**NEW, "weak_train.objective": "contrastive"}, "config.weak_train.objective", "supervised"),
    "wrong key of a network": ({**NEW, "weak_train.dropout": 2}, "config.weak_train.dropout: 2.0", "below 1"),
    "patch larger than the image": (
        {**NEW, "weak_train.batch_size": 8, "weak_train.arch.patch": 9}, "config.weak_train.arch.patch: 9", "8 x 8 pixels"),
    "batch larger than the part": ({**NEW, "weak_train.batch_size": 64}, "config.weak_train.batch_size=64", "12 training images"),
    "warm-up longer than the run": (
        {"strong_model": "", "strong_train.warmup_steps": 900}, "config.strong_train.warmup_steps=900", "fewer than the run's"),
    "dropout where there is none": ({"finetune": True, "student_train.dropout": 0.1}, "dropout=0.1", "have none"),
    "mesh that does not fit": ({"mesh.data": 3, "mesh.fsdp": 5}, "mesh", "'fsdp': 5", "8 devices"),
    "features that are a file": (lambda root, own: {"features": own["weak_model"]}, "config.features", "is a file"),
}  # fmt: skip
LATE = re.compile("hub|classifier|strong file|model does not|patch|batch|warm-up|where there|mesh")  # those need a model, or devices


def tree(folder: Path) -> dict:
    return {str(path): path.read_bytes() if path.is_file() else "" for path in folder.rglob("*")}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_gets_one_line_and_leaves_nothing(name, published, tmp_path, capfd, monkeypatch):
    change, *expected = WRONG[name]
    own = keys_of(published, seeds="0", **{"resize": 0, "crop": 0})
    change = change(tmp_path, own) if callable(change) else change
    argv = ["--config=vision", *(f"--config.{key}={value}" for key, value in {**own, **change}.items()), f"--workdir={tmp_path / 'run'}"]
    devices, setup = [], entry.setup_devices
    monkeypatch.setattr(entry, "setup_devices", lambda *args: devices.append(1) or setup(*args))
    before = tree(tmp_path)
    capfd.readouterr()
    assert entry.main(argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(part in err for part in expected), err
    assert "document" not in err and tree(tmp_path) == before
    assert not devices or LATE.search(name), "jax was set up before the answer"


TRAIN = {
    "unknown loss": ({"loss": "logcnf"}, "config.loss: 'logcnf'"),
    "loss of two classes": ({"loss": "logconf_eleuther"}, "config.loss: 'logconf_eleuther'", "digits has 10"),
    "part that is empty": ({"split": "weak"}, "split=weak: has no images", "config.n_weak"),
    "labels without use": ({"objective": "contrastive", "labels": "/nowhere.parquet"}, "config.labels"),
    "labels that are not there": ({"labels": "/nowhere.parquet"}, "config.labels: '/nowhere.parquet', no such file"),
    "head without use": ({"objective": "contrastive", "train": "head"}, "config.train: 'head'", "expected 'full'"),
    "dropout without use": ({"objective": "contrastive", "dropout": 0.1}, "config.dropout: 0.1"),
    "nothing to tell apart": ({"objective": "contrastive", "batch_size": 1}, "config.batch_size: 1"),
    "pretraining of what cannot be kept": (
        lambda root: {"objective": "contrastive", "model": str(cifar(root)), "augment.flip": True}, "config.model", "cannot be pretrained",
        "no class for this ResNet"),
    "adapters": ({"train": "lora"}, "config.train: 'lora'", "full, head"),
    "patch larger than the image": ({"arch.patch": 16}, "config.arch.patch: 16", "at most 8"),
    "heads that do not divide": ({"arch.heads": 3}, "config.arch.heads: 3"),
    "batch larger than the part": ({"batch_size": 999}, "batch_size=999", "64 training images"),
    "mesh that does not fit": ({"mesh.data": 3, "mesh.fsdp": 5}, "mesh", "'fsdp': 5", "8 devices"),
    "images of another shape": (lambda root: odd(root, "blue/!.png"), "config.crop: 0", "12 x 8 pixels", "squares"),
    "one image of another shape": (lambda root: odd(root, "red/~.png"), "red/~.png: 12 x 8 pixels", "8 x 8", "crop=PIXELS"),
    "image smaller than the model's patch": (
        lambda root: {"model": str(tinyvision.write_model(root / "model")), "crop": 2, "resize": 2}, "2 x 2 pixels", "patch of 4"),
}  # fmt: skip


def cifar(root) -> Path:
    from vision_reference import ResNet, randomize

    network = randomize(ResNet((1, 1), stem=8, inner=(8, 16), expansion=1, classes=3, bottleneck=False, small=True), 1)
    torchfiles.save(network.state_dict(), root / "cifar.pth", torchfiles.ZIP)
    return root / "cifar.pth"


def odd(root, name: str) -> dict:
    """Images of which one is no square."""
    content = encoded(pixels(1, height=8, width=12))
    return {"dataset": str(tinyvision.write_images(root / "data", **{name: content})), "n_train": 20, "n_test": 0}


@pytest.mark.parametrize("name", TRAIN)
def test_what_is_wrong_with_a_training(name, tmp_path, capfd):
    change, *expected = TRAIN[name]
    change = change(tmp_path) if callable(change) else change
    keys = {key.replace("__", "."): value for key, value in (tinyvision.DATA | tinyvision.NETWORK).items()}
    argv = ["--config=vision_train", *(f"--config.{k}={v}" for k, v in {**keys, **change}.items()), f"--workdir={tmp_path / 'run'}"]
    before = tree(tmp_path)
    capfd.readouterr()
    assert entry.main(argv) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if "classification head" not in line]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: ") and all(part in err for part in expected), err
    assert "document" not in err and tree(tmp_path) == before


def test_the_answer_comes_before_jax(cli, tmp_path):
    for module in ("jax", "jaxlib", "flax", "transformers", "datasets", "torch"):
        (tmp_path / "poison" / f"{module}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "poison" / f"{module}.py").write_text(f"import os\nprint('{module} was imported', flush=True)\nos._exit(1)\n")
    root = Path(__file__).resolve().parents[1]
    for argv, part in ((["vision", "--config.losses=xnt"], "'xnt'"), (["vision_train", "--config.n_train=2000"], "n_train=2000"),
                       (["vision:quick", "--config.weak_train.arch.heads=3"], "config.weak_train.arch.heads: 3")):
        argv = ["--config", *argv]
        done = cli(*argv, f"--workdir={tmp_path / 'run'}", PYTHONPATH=f"{tmp_path / 'poison'}:{root}")
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1 and part in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_help(capfd):
    assert entry.main(["--config=vision", "--help"]) == 0
    said = capfd.readouterr().out
    assert re.search(r"--config.losses=xent +of students, by name", said) and "\n  weak_train: Optimisation\n" in said
    assert "--config.weak_train.epochs=" in said and "--config.weak_train.dataset" not in said and "--config.student_train.arch" not in said
    for network in ("weak_train", "strong_train", "student_train"):
        first, *others = re.findall(rf"\n  ({network}(?:: \w+)?)\n", said)
        assert first in (network, f"{network}: Model") and f"{network}: Optimisation" in others
    assert entry.main(["--config=vision_train", "--help"]) == 0
    assert "--config.arch.width=64" in capfd.readouterr().out


def test_runlocal(tmp_path, capfd):
    assert entry.main(["--config=vision:runlocal", f"--workdir={tmp_path / 'run'}", "--config.mesh.data=1"]) == 0
    said = capfd.readouterr().err
    assert "document" not in said and "128 to test on" in said and "logits 384/384" in said and "features 384/384" in said
    assert said.splitlines()[-1].startswith("the test set is small: 128 images") or "report in" in said.splitlines()[-1]
    assert "document" not in (tmp_path / "run/report/report.md").read_text()
