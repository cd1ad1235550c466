"""Weak-to-strong on images: weak labels, frozen features of a strong model, linear probes, and fine-tuned students beside them.

openai/weak-to-strong `vision/run_weak_strong.py`. The directory is a run (config.json, results.json) and holds

    features/       logits of the weak and features of the strong model (w2s_jax/store.py)
    labels/         weak-s<seed>.parquet: the supervisor's labels of the train part, which any run of vision_train takes
    predictions/    test images: the supervisors' and every student's and ceiling's
    runs/           networks that are trained here, runs of vision_train
    report/         tables, plots, pictures

`--rerun` redoes all of it, the networks too; what lies in a folder that config.features names stays, but for networks trained here,
which are never kept there.
"""

from __future__ import annotations

import time

import jax
import numpy as np
from etils import epath

from w2s_jax import checkpoint as ckpt
from w2s_jax import config as config_lib
from w2s_jax import gallery, losses, metrics, readings, runlog, stages, transfer, vision, vision_report, workload
from w2s_jax import mesh as mesh_lib
from w2s_jax.config import GIVEN, NETWORKS, SET
from w2s_jax.data import images as images_lib
from w2s_jax.data import labels as labels_lib
from w2s_jax.errors import UserError
from w2s_jax.graph import Graph, variant
from w2s_jax.models import vision as models
from w2s_jax.probes import path as path_lib
from w2s_jax.probes import softmax
from w2s_jax.progress import Progress, say
from w2s_jax.runlog import Run

SAVE_SECONDS = 30.0  # between two checkpoints of the probes
MADE = ("features", "labels", "report")  # what --rerun removes besides a run's own


def identity(config, planned: dict | None = None, prepared=None) -> dict:
    """What the experiment is: images, models or how they are trained, probes. Arguments as in the stage vision_train."""
    fingerprints = {"dataset": vision.fingerprint_data(config, planned, prepared), "data_dir": None, "dataset_split": None, "classes": None}
    for key in ("weak", "strong"):
        name, revision = config[f"{key}_model"], config[f"{key}_revision"]
        fingerprints |= {f"{key}_model": vision.fingerprint(name, revision, planned) if name else None, f"{key}_revision": None}
    for key in NETWORKS:  # their images, labels and seeds are those of this run
        if not _used(config)[key]:
            fingerprints[key] = None
            continue
        start = config[key].model and vision.fingerprint(config[key].model, config[key].revision, planned)
        fingerprints[key] = vision.identity(config[key], {"model": start} | dict.fromkeys(("data_seed", *GIVEN, *SET[key])))
    # Losses that are not in `losses` have no say, whatever their arguments; what a loss takes is resolved by name.
    fingerprints["loss_args"] = {loss: config_lib.loss_args(_with_loss(config, loss)) for loss in config.losses}
    return config_lib.identity(config, fingerprints)


def _used(config) -> dict[str, bool]:
    """Which networks are trained here."""
    return dict(zip(NETWORKS, (not config.weak_model, not config.strong_model, config.finetune)))


def _with_loss(config, loss: str):
    """`loss_args` of the experiment, as `config_lib.loss_args` takes them for one of its losses."""
    return config_lib.ConfigDict({"loss": loss, "loss_args": dict(config.loss_args)})


def run(config, workdir, *, rerun: bool = False, prepared: images_lib.Prepared | None = None, **_) -> dict:
    """Run the experiment in `workdir` and return its results (those of results.json).

    Args:
      prepared: the images of `config`, where `stages.prepare` has read them already.

    Raises:
      UserError: bad input, found before anything is written.
    """
    start = time.perf_counter()
    prepared = prepared or images_lib.prepare(config)
    ident = identity(config, prepared=prepared)
    if (done := workload.finished(workdir, config, ident, rerun, transfer.summary)) is not None:
        return done
    with workload.precision(config):
        experiment = _Experiment(config, epath.Path(workdir).expanduser(), prepared, rerun)  # refuses what cannot be used
        with Run.open(workdir, config, ident, rerun=rerun) as run_:
            for name in MADE if rerun else ():
                if (run_.path / name).is_dir():
                    (run_.path / name).rmtree()
            run_.start({"fingerprints": {"dataset": prepared.images.fingerprint}, "classes": prepared.images.n_classes,
                        "class_names": list(prepared.images.class_names), "mesh": dict(experiment.mesh.shape), "parents": [],
                        "revisions": {f"{part.key}_model": part.commit for part in experiment.given.values()}})
            for note in prepared.notes:
                say(note)
            say(f"{workload.shown(workdir)}: {workload.shown(prepared.images.name)}, {prepared.images.n_classes} classes, "
                f"{len(prepared.split.train)} images to learn from and {len(prepared.split.test)} to test on")
            results = experiment.run(run_) | {"seconds": time.perf_counter() - start}
            ckpt.Checkpoints(run_.path).clear()  # the probes' progress: their predictions are written
            run_.finish(results)
    say(f"{workload.shown(workdir)}: {transfer.summary(results)}; report in {epath.Path(workdir) / 'report' / 'report.md'}")
    if warning := metrics.small_test_warning({**results["weak"], "n_test": results["n_test"]}, things="images"):
        say(warning)
    return results


class _Experiment:
    """The steps of a run. `labels` int `[test]`: the truth; `sets`: of each seed the name of its label set, which a supervisor that is
    given has one of."""

    def __init__(self, config, path, prepared: images_lib.Prepared, rerun: bool):
        self.config, self.path, self.prepared, self.rerun = config, path, prepared, rerun
        self.images, self.seeds = prepared.images, tuple(config.seeds)
        self.mesh = mesh_lib.make_mesh(config.mesh)
        self.graph = Graph(path, stages.identity)
        self.stats: dict = {}
        self.notes: list[str] = []
        self._first_student = None  # test logits of the first seed's student with the first loss
        place = config.features or path / "features"
        self.given = {key: readings.Reading(key, config[f"{key}_model"], config[f"{key}_revision"], config, self.images, place)
                      for key in ("weak", "strong") if config[f"{key}_model"]}
        loaders = [loader for key, used in _used(config).items() if used and (loader := self._check(key))]
        for part in self.given.values():
            if part.store.missing(self.images, self._rows()) or (rerun and not config.features):
                part.open()
        if loaders:
            self.prepared = prepared.decoded(loaders[0], self.notes)

    def _rows(self) -> np.ndarray:
        """Images that the models read."""
        return np.concatenate([self.prepared.split.train, self.prepared.split.test])

    def _base(self, key: str):
        """The config of a network that is trained here."""
        return variant(self.config[key], **{name: self.config[name] for name in GIVEN})

    def _check(self, key: str) -> images_lib.Loader | None:
        """Refuses what a network cannot be trained with; the images as it sees them, if it is known now."""
        base = self._base(key)
        try:
            vision.orders(base, len(self.prepared.part(base.split)))
            if key != "student_train" and not base.model:
                return vision.new_vit(base, self.images)[1]
        except UserError as error:
            own = str(error).startswith(("config.arch.", "batch_size=", "warmup_steps=", "split="))
            raise UserError(f"config.{key}.{str(error).removeprefix('config.')}") if own else error from None
        if key == "student_train" and "strong" not in self.given:
            return None
        own = self.given["strong"].own if key == "student_train" else vision.read_config(base.model, base.revision)
        models.build(own, head="new", classes=self.images.n_classes, dropout=float(base.dropout))
        return self.given["strong"].loader if key == "student_train" else vision.loader(base, self.images, own)

    def run(self, run_) -> dict:
        self.run_, config, images = run_, self.config, self.images
        weak = {s: config.weak_model or self._network("weak_train", f"weak-s{s}", seed=s) for s in self.seeds}
        strong = config.strong_model or self._network("strong_train", "strong")
        self.sets = {s: f"weak-s{next(first for first in self.seeds if weak[first] == weak[s])}" for s in self.seeds}
        passed = time.perf_counter()
        logits = {name: self._read("weak", name) for name in dict.fromkeys(weak.values())}
        features = self._read("strong", strong)
        split = self.prepared.split  # without what could not be decoded
        for note in self.notes:
            say(note)
        passed = time.perf_counter() - passed
        train, test = ({name: part.get(rows) for name, part in logits.items()} for rows in (split.train, split.test))
        self.train_logits, self.test_logits = ({s: part[weak[s]] for s in self.seeds} for part in (train, test))
        self.labels = images.labels[split.test]
        self.compare = transfer.Comparison(self.labels, [images.shas[r] for r in split.test], images.n_classes)
        documents = vision.examples(images, split.train)
        for s in self.seeds:
            labels_lib.write_predictions(self._labels_file(s), documents, self.train_logits[s])

        results = {
            "dataset": workload.shown(images.name),
            "strong": workload.shown(strong) if config.strong_model else "strong network (pretrained here, without labels)",
            "n_train": len(split.train), "n_test": len(split.test), "n_weak": len(split.weak), "n_classes": images.n_classes,
            "seeds": list(self.seeds), "undecodable": len(self.prepared.bad), "undecodable_named": self.prepared.named_bad(),
            "weak": self.compare.weak(workload.shown(config.weak_model) if config.weak_model else "weak network (trained here)",
                                      [self.test_logits[s] for s in self.seeds]),
            "weak_train_accuracy": float(np.mean([metrics.accuracy(self.train_logits[s], images.labels[split.train]) for s in self.seeds])),
            "methods": [], "noise": [], "l2": {}}
        probed = time.perf_counter()
        self._probes(features.get(split.train), features.get(split.test), results)
        probed = time.perf_counter() - probed
        if config.finetune:
            self._finetuned(strong, results)
        for s in self.seeds:
            self._write(f"weak-s{s}", self.test_logits[s])
        vision_report.write(self.path / "report", results, self._pictures(features.loader))
        return results | {"feature_seconds": passed, "probe_seconds": probed, "compile_seconds": self.stats.get("compile_seconds", 0.0)}

    # ---------------------------------------------------------------- networks, labels, features

    def _network(self, template: str, name: str, **keys) -> str:
        """A network that is trained here, once; its run."""
        base = variant(self._base(template), **keys)
        node = self.graph.add("runs", name, base)
        stages.run(base, self.graph.path(node), prepared=self.prepared, rerun=self.rerun)
        return self.graph.path(node)

    def _read(self, key: str, name: str) -> readings.Reading:
        """What a model reads of the images, after one pass over those that lack it."""
        part = self.given.get(key) or readings.Reading(key, name, "main", self.config, self.images, self.path / "features")
        part.compute(self._rows(), self.stats)
        self.prepared = self.prepared.without(part.loader, self.notes)
        return part

    def _labels_file(self, seed: int) -> str:
        return str(self.path / "labels" / f"weak-s{seed}.parquet")

    # ---------------------------------------------------------------- probes

    def _lanes(self, targets: dict) -> list[softmax.Lane]:
        """Ceilings, students of every loss, and probes on noisy truth, for every seed."""
        config = self.config
        truth = losses.make("xent", ground_truth=True)
        stats = {name: losses.label_statistics(labels) for name, labels in targets.items() if name != "truth"}
        lanes = [softmax.Lane("truth", s, truth) for s in self.seeds]
        for loss in config.losses:
            args = config_lib.loss_args(_with_loss(config, loss))
            lanes += [softmax.Lane(self.sets[s], s, losses.make(loss, args, ground_truth=False, label_stats=stats[self.sets[s]]))
                      for s in self.seeds]
        return lanes + [softmax.Lane("truth", s, truth, float(level)) for level in config.noise for s in self.seeds]

    def _probes(self, x: np.ndarray, x_test: np.ndarray, results: dict) -> None:
        config, split = self.config, self.prepared.split
        names = {name: s for s, name in reversed(self.sets.items())}
        targets = {"truth": self.images.labels[split.train]} | {n: labels_lib.softmax(self.train_logits[s]) for n, s in names.items()}
        references = {"truth": self.labels} | {n: metrics.predictions(self.test_logits[s]) for n, s in names.items()}
        lanes = self._lanes(targets)
        say(f"{len(lanes)} probes on {x.shape[1]} features of {len(x)} images, {config.epochs} epochs")
        trained, noisy = self._trained(softmax.Training(
            x, targets, lanes, test=x_test, references=references, epochs=config.epochs, batch_size=config.batch_size,
            learning_rate=config.learning_rate, weight_decay=config.weight_decay, schedule=config.schedule,
            mesh=self.mesh))
        at = {(lane.labels, lane.seed, lane.loss.name, lane.noise): i for i, lane in enumerate(lanes)}
        ceiling = {s: at["truth", s, "xent", 0.0] for s in self.seeds}
        for s in self.seeds:
            self._write(f"probe_truth-s{s}", trained.logits[ceiling[s]])
        for loss in config.losses:
            trios = []
            for s in self.seeds:
                i = at[self.sets[s], s, loss, 0.0]
                curves = {"accuracy": trained.against["truth"][i].tolist(), "agreement": trained.against[self.sets[s]][i].tolist(),
                          "ceiling": trained.against["truth"][ceiling[s]].tolist()}
                trios.append(transfer.Trio(s, self.test_logits[s], trained.logits[i], trained.logits[ceiling[s]], curves))
                self._write(f"probe_{loss}-s{s}", trained.logits[i])
                if self._first_student is None:
                    self._first_student = trained.logits[i]
            results["methods"].append(self.compare.method(f"probe {loss}", trios))
        for level in config.noise:
            rows = [at["truth", s, "xent", float(level)] for s in self.seeds]
            value = self.compare.accuracy([trained.logits[i] for i in rows])
            results["noise"].append({"level": float(level), "label_accuracy": float(np.mean([noisy[i] for i in rows])),
                                     "accuracy": [float(trained.against["truth"][i, -1]) for i in rows], "accuracy_ci": value[1]})
        if config.l2:
            self._converged(x, x_test, targets, results)

    def _trained(self, training: softmax.Training) -> tuple[softmax.Trained, list[float]]:
        """The probes after all epochs, going on where an attempt that was killed left them; and how often each lane's labels are true."""
        checkpoints = ckpt.Checkpoints(self.run_.path, keep=1)
        place, saved = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), time.monotonic()
        try:
            for step in checkpoints.steps():
                form = training.abstract()
                try:
                    params, rest = checkpoints.restore(step, form["params"], {key: form[key] for key in ("opt_state", "history")})
                except UserError as error:
                    say(f"{error}; the probes start over")
                    continue
                training.load(step, {"params": params, **rest})
                say(f"probes: resumed after {step} of {training.epochs} epochs")
                break
            with Progress(training.work * training.epochs, start=training.work * training.done, label="probes") as bar:
                while training.done < training.epochs:
                    training.run_epoch(bar)
                    if time.monotonic() - saved > SAVE_SECONDS and training.done < training.epochs:
                        state = jax.device_put(training.state(), place)
                        checkpoints.save(training.done, params=state["params"], meta={"epochs": training.done},
                                         opt_state={key: state[key] for key in ("opt_state", "history")}, rng=np.zeros(1, np.uint32))
                        checkpoints.wait()
                        saved = time.monotonic()
        finally:
            checkpoints.close()
        truth = self.images.labels[self.prepared.split.train]
        noisy = [float(np.mean(training.targets.of(lane.labels, lane.noise, lane.seed)[0] == truth)) if lane.noise else 1.0
                 for lane in training.lanes]
        return training.result(), noisy

    def _converged(self, x: np.ndarray, x_test: np.ndarray, targets: dict, results: dict) -> None:
        """Probes fitted to convergence; a penalty is chosen by the loss on held-out images of the labels that are fitted."""
        config = self.config
        held = np.random.default_rng([config.data_seed, 0x12]).permutation(len(x))[: max(len(x) // 10, 1)]
        fit = np.setdiff1d(np.arange(len(x)), held)
        paths: dict = {}
        for name, labels in targets.items():
            say(f"probes to convergence on {name}: {len(config.l2)} penalties")
            path = path_lib.fit_path(x[fit], labels[fit], config.l2, classes=self.images.n_classes, heldout=(x[held], labels[held]),
                                     label=f"converged, {name}")
            best = path[path_lib.choose(path)].l2
            whole = path_lib.fit_path(x, labels, [l2 for l2 in config.l2 if l2 >= best], classes=self.images.n_classes)[-1]
            paths[name] = (path, best, whole.logits(x_test))
        for name, title in (("truth", "ground truth"), (self.sets[self.seeds[0]], "weak labels")):
            path, chosen, _ = paths[name]
            supervisor = metrics.predictions(self.test_logits[self.seeds[0]])
            rows = []
            for point in path:
                predicted = metrics.predictions(point.logits(x_test))
                rows.append({"l2": point.l2, "heldout_loss": point.heldout_loss, "accuracy": float(np.mean(predicted == self.labels)),
                             "agreement": float(np.mean(predicted == supervisor)), "chosen": point.l2 == chosen})
            results["l2"][title] = rows
        trios = [transfer.Trio(s, self.test_logits[s], paths[self.sets[s]][2], paths["truth"][2]) for s in self.seeds]
        for trio in trios:
            self._write(f"converged_xent-s{trio.seed}", trio.student)
        self._write("converged_truth", trios[0].ceiling)
        results["methods"].append(self.compare.method("probe converged", trios))

    # ---------------------------------------------------------------- fine-tuning

    def _finetuned(self, strong: str, results: dict) -> None:
        """Students and ceilings of which all parameters are trained, by the stage vision_train."""
        config = self.config

        def trained(name: str, seed: int, loss: str, labels: str) -> np.ndarray:
            base = variant(self._base("student_train"), seed=seed, loss=loss, model=strong, labels=labels, revision=config.strong_revision)
            with base.unlocked(), base.ignore_type():
                base.loss_args.update({k: v for k, v in config.loss_args.items() if labels and k in config_lib.LOSS_ARGS[loss]})
            node = self.graph.add("runs", f"{name}-s{seed}", base, (self._labels_file(seed),) if labels else ())
            stages.run(base, self.graph.path(node), prepared=self.prepared, rerun=self.rerun)
            found = runlog.load(self.graph.path(node)).predictions("test")
            at = {ident: row for row, ident in enumerate(found["id"])}
            return np.stack(found["logits"].to_numpy())[[at[self.images.ids[r]] for r in self.prepared.split.test]]

        ceiling = {s: trained("ceiling", s, "xent", "") for s in self.seeds}
        for loss in config.losses:
            trios = [transfer.Trio(s, self.test_logits[s], trained(f"student-{loss}", s, loss, self._labels_file(s)), ceiling[s])
                     for s in self.seeds]
            results["methods"].append(self.compare.method(f"fine-tuned {loss}", trios))

    # ---------------------------------------------------------------- files

    def _write(self, name: str, logits: np.ndarray) -> None:
        """predictions/<name>.parquet of the test images."""
        if self.config.predictions:
            workload.write_predictions(self.run_, name, vision.examples(self.images, self.prepared.split.test), logits)

    def _pictures(self, loader: images_lib.Loader) -> list[gallery.Picture]:
        """Test images for the report, of the first seed and method, in turns: the student right where the supervisor is wrong, the other
        way round, both wrong, both right."""
        config, seed = self.config, self.seeds[0]
        if not config.pictures:
            return []
        weak, student = (labels_lib.softmax(logits) for logits in (self.test_logits[seed], self._first_student))
        right = [metrics.predictions(p) == self.labels for p in (weak, student)]
        kinds = [np.flatnonzero(rows) for rows in (~right[0] & right[1], right[0] & ~right[1], ~right[0] & ~right[1], right[0] & right[1])]
        order = [rows[i] for i in range(max(map(len, kinds))) for rows in kinds if i < len(rows)][: min(config.pictures, gallery.MOST)]
        rows = self.prepared.split.test[order]
        pixels = loader.pixels(rows)
        titles = self.images.titles
        return [gallery.Picture(image, titles[self.labels[i]], titles[w], float(weak[i, w]), titles[s], float(student[i, s]))
                for image, i, w, s in zip(pixels, order, weak[order].argmax(1), student[order].argmax(1))]
