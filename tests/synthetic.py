"""Study folders with planted effects, written by the project's own writers.

Numbers are drawn from what a trial changes and its seed, so that the order of writing, missing
trials, crashes and new fields of the recipe change nothing in those that are written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ablate.analysis.results import Result
from ablate.records.answers import pack, pack_labels
from ablate.records.attempt import AttemptWriter
from ablate.records.folder import StudyRecord
from ablate.study import Study, design, parse_study
from ablate.trial.identity import Trial

STEPS, EPOCHS, CLASSES, IMAGES = 240, 12, 100, 2000

QUICK = """\
# Which of the usual suspects moves zero-shot accuracy of a small ResNet CLIP?
#
# Cost: 3 worker-hours on two cores. Expected: warmup and the loss matter, precision does not.
recipe: openclip
baseline:
  model: tiny-rn-a
  train_data: data/train-{0000..0003}.tar
  train_num_samples: 2560
  imagenet_val: data/val
  precision: amp_bf16
  batch_size: 64
  lr: 1.0e-3
  wd: 0.1
  warmup: 20
  epochs: 12
  zeroshot_frequency: 1
factors:
  precision: [amp_bf16, amp, fp32]
  warmup: [20, 5, 60]
  beta2: [0.999, 0.98]
  contrastive_loss:
    default: {}
    local_gather: {local_loss: true, gather_with_grad: true}
    local_only: {local_loss: true}
  lr: [1.0e-3, 2.0e-3, 2.0e-2]
  augmentation:
    default: {}
    strong: {aug_cfg: {use_timm: true, scale: [0.4, 1.0], re_prob: 0.3}}
controls: {contrastive_loss: [local_gather]}
design: one_at_a_time
seeds: [0, 1, 2, 3]
objective: {metric: imagenet_top1, direction: maximize, margin: 0.01}
gang: {workers: 2}
"""

EFFECTS = {
    ("warmup", "5"): -0.034,
    ("warmup", "60"): 0.003,
    ("beta2", "0.98"): 0.016,
    ("contrastive_loss", "local_only"): -0.062,
    ("lr", "0.002"): 0.012,
    ("augmentation", "strong"): 0.027,
}
DIVERGED = {("lr", "0.02"): (0, 1, 3)}
SPIKY = {("lr", "0.002"), ("beta2", "0.98"), ("warmup", "5")}

FINGERPRINT = {
    "code": {"commit": "4c1e0d2", "dirty": False},
    "versions": {"python": "3.11.2", "torch": "2.14.1", "open_clip_torch": "3.3.0"},
    "data": {"train_data": "sha256:7d1f0c55a9", "imagenet_val": "sha256:0b77ce1240"},
}


def study_of(folder: Path, text: str = QUICK, *, name: str = "quick") -> Study:
    """The study of `text`, whose data live under `folder`."""
    for index in range(CLASSES):
        (folder / "data" / "val" / f"class-{index:03d}").mkdir(parents=True, exist_ok=True)
    names = [f"class {index}" for index in range(CLASSES)]
    (folder / "data" / "val" / "classnames.json").write_text(json.dumps(names))
    (folder / "data" / "val" / "templates.json").write_text(json.dumps(["a photo of a {}."]))
    return parse_study(text, path=f"{name}.yaml", root=folder)


def write_study(
    folder: Path,
    study: Study,
    *,
    effects: Mapping[tuple[str, str], float] = EFFECTS,
    diverged: Mapping[tuple[str, str], Collection[int]] = DIVERGED,
    spiky: Collection[tuple[str, str]] = SPIKY,
    failed: Collection[tuple[str, str, int]] = (),
    missing: Collection[tuple[str, str, int]] = (),
    crash_at: int | None = None,
    results: Sequence[Result] = (),
    asked: Sequence[Mapping[str, str]] = (),
    memory: Mapping[tuple[str, str], float] = {},
    noise: float = 0.0045,
    speed: float = 900.0,
) -> StudyRecord:
    """Run the study on paper; levels are named (factor, level), the baseline ("baseline", "").

    `crash_at`: every trial's first attempt dies at that step and is resumed half-way to it.
    `results`: what is known so far, for designs that ask for more as results come in.
    `asked`: levels of the cells that a search asked. `memory`: GiB that a level adds to 4.
    """
    record = StudyRecord(folder / "runs" / study.name)
    record.write_study(
        {
            "format": 1,
            "name": study.name,
            "path": study.source.path,
            "root": study.root,
            "text": study.source.text,
            "version": "0.1.0",
        }
    )
    usual = study.baseline_levels()
    trials = {trial.id: trial for trial in design.propose(study, results)}
    for levels in asked:
        for seed in study.seeds:
            trial = study.trial(study.cell(levels), seed=seed)
            trials.setdefault(trial.id, trial)
    for trial in trials.values():
        changed = [pair for pair in trial.cell.levels if pair[1] != usual[pair[0]]]
        changed = changed or [("baseline", "")]
        tags = {(*pair, trial.seed) for pair in changed}
        home = record.write_trial({**trial.to_json(), "fingerprint": FINGERPRINT})
        if home.outcome() is not None:
            continue
        if tags & set(missing):
            continue
        run = _Run(
            study,
            trial,
            gain=sum(effects.get(pair, 0.0) for pair in changed),
            noise=noise,
            diverges=any(trial.seed in diverged.get(pair, ()) for pair in changed),
            spiky=any(pair in spiky for pair in changed),
            speed=speed,
        )
        if tags & set(failed):
            number = record.new_attempt(home)
            record.write_end(home, number, {"kind": "crashed", "wall_s": 3.0, "step": 0})
            record.write_outcome(
                home,
                {
                    "outcome": "failed",
                    "value": None,
                    "attempt": 1,
                    "wall_s": 3.0,
                    "time": 9.0,
                    "reason": "4 attempts without progress; the last: rank 1 <bus error>",
                },
            )
            continue
        spans = [(0, None)] if crash_at is None else [(0, crash_at), (crash_at // 2, None)]
        for first, last in spans:
            number = record.new_attempt(home)
            run.write(AttemptWriter(home.folder, number), first=first, last=last)
            kind = "ended" if last is None else "crashed"
            wall_s = 60.0 + 7.0 * number
            record.write_end(home, number, {"kind": kind, "wall_s": wall_s, "step": last or STEPS})
        record.write_outcome(
            home,
            {
                **run.outcome(),
                "peak_memory_gib": 4.0 + sum(memory.get(pair, 0.0) for pair in changed),
                "attempt": number,
                "time": 1.7e9 + number,
                "wall_s": 67.0 * number,
            },
        )
    return record


def draw_of(changed: Sequence[tuple[str, str]]) -> np.random.Generator:
    """The same for all runs of a cell."""
    digest = hashlib.sha256(f"{changed}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


class _Run:
    """One made-up training run."""

    def __init__(
        self,
        study: Study,
        trial: Trial,
        *,
        gain: float,
        noise: float,
        diverges: bool,
        spiky: bool,
        speed: float,
    ) -> None:
        usual = study.baseline_levels()
        changed = [pair for pair in trial.cell.levels if pair[1] != usual[pair[0]]]
        digest = hashlib.sha256(f"{changed} {trial.seed}".encode()).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        block = np.random.default_rng(trial.seed).normal(0, 0.012)
        self.study, self.trial, self.speed = study, trial, speed
        self.final = 0.31 + gain + float(block) + float(draw.normal(0, noise))
        progress = np.arange(1, STEPS + 1) / STEPS
        wobble = np.convolve(draw.normal(0, 0.09, STEPS + 20), np.ones(5) / 5, "valid")[:STEPS]
        self.loss = 1.35 + 3.5 * np.exp(-4.2 * progress) - 1.5 * gain + wobble
        # The easiest images are right, as many as the score says; what is easy is common to all
        # runs in most part, and in some to the runs of a cell.
        ease = np.random.default_rng(1).normal(0, 2, IMAGES) + draw_of(changed).normal(
            0, 0.5, IMAGES
        )
        ease += np.random.default_rng(int.from_bytes(digest[8:16], "big")).normal(0, 1, IMAGES)
        self.right = ease.argsort().argsort() >= IMAGES - round(self.final * IMAGES)
        self.events: list[dict[str, Any]] = []
        if spiky:
            for _ in range(1 + int(draw.integers(0, 3))):
                at = int(draw.integers(40, STEPS - 30))
                self.loss[at : at + 12] += 1.6 * np.exp(-np.arange(12) / 3.5)
                self.events.append(_event("loss_spike", at + 1, at + 9, "warning", "SPIKY"))
        self.stopped_at = STEPS
        if diverges:
            start = int(draw.integers(70, 120))
            rise = 1 - np.exp(-np.arange(STEPS - start) / 12)
            self.loss[start:] += (math.log(128) - self.loss[start:]) * rise
            self.stopped_at = start + 60
            self.loss[self.stopped_at - 2 :] = np.nan
            self.events.append(_event("grad_norm_spike", start + 1, start + 4, "warning", "SPIKY"))
            self.events.append(
                _event("divergence", start + 8, self.stopped_at, "fatal", "DIVERGED")
            )
        self.diverges = diverges
        self.scores = [
            self.final * (1 - math.exp(-3.2 * (epoch + 1) / EPOCHS)) / (1 - math.exp(-3.2))
            + (float(draw.normal(0, noise / 2)) if epoch < EPOCHS - 1 else 0.0)
            for epoch in range(EPOCHS)
        ]

    def write(self, writer: AttemptWriter, *, first: int, last: int | None) -> None:
        stop = min(last or self.stopped_at, self.stopped_at)
        at = writer.attempt
        writer.step(
            {
                "step": step,
                "attempt": at,
                "time": 1.7e9 + at * 500 + step,
                "epoch": step * EPOCHS / STEPS,
                "samples": step * 128,
                "lr": 1e-3,
                "loss": float(self.loss[step - 1]),
                "grad_norm": 1.0,
                "samples_per_s": self.speed - at,
            }
            for step in range(first + 1, stop + 1)
        )
        for epoch, score in enumerate(self.scores, start=1):
            step = epoch * STEPS // EPOCHS
            if first < step <= stop:
                late = self.diverges and step > self.stopped_at - 60
                writer.evaluation(
                    {
                        "step": step,
                        "attempt": at,
                        "time": 1.7e9,
                        "epoch": float(epoch),
                        "imagenet_top1": 1 / CLASSES if late else score,
                        "imagenet_top5": 5 / CLASSES if late else min(2.1 * score, 1.0),
                        "eval_images": IMAGES,
                        "eval_time_s": 1.0,
                    }
                )
        if first < STEPS <= stop and not self.diverges:
            told = {"images": IMAGES, "right": pack(self.right)}
            told["labels"] = pack_labels(np.arange(IMAGES) * CLASSES // IMAGES)
            writer.answers({"step": STEPS, "of": {"imagenet_top1": told}})
        for event in self.events:
            if first < event["first_step"] <= stop:
                writer.event(event)
        if last is None:
            writer.result(
                {
                    "status": "diverged" if self.diverges else "completed",
                    "step": self.stopped_at,
                    "wall_s": 60.0,
                    "peak_memory_gib": None,
                }
            )
        writer.close()

    def outcome(self) -> dict[str, Any]:
        names = {event["verdict"] for event in self.events}
        verdict = next((name for name in ("DIVERGED", "SPIKY") if name in names), "STABLE")
        return {
            "outcome": "diverged" if self.diverges else "completed",
            "value": None if self.diverges else self.scores[-1],
            "step": self.stopped_at,
            "verdict": verdict,
            "flags": [],
            "reason": "loss is back at ln B" if self.diverges else "",
            "final": {} if self.diverges else {"imagenet_top1": self.scores[-1]},
            "num_parameters": 1_234_567,
        }


def _event(marker: str, first: int, last: int, severity: str, verdict: str) -> dict[str, Any]:
    return {
        "marker": marker,
        "first_step": first,
        "last_step": last,
        "severity": severity,
        "evidence": {"kind": marker, "quantity": "loss"},
        "detected_at": first + 2,
        "message": f"{marker} at step {first}",
        "verdict": verdict,
        "flag": "",
        "stop": severity == "fatal",
    }
