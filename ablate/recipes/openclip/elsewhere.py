"""Flags of open_clip_train 3.3.0 and usual names that are no fields here; what to write instead."""

from __future__ import annotations

from collections.abc import Mapping

_OWN = "is no choice here: every trial writes its own records, and `ablate` shows them"
_RUN = "is no choice of a trial: the study's gang says where and on how many machines it runs"
_PAIRS = "is not offered: training data are WebDataset shards; write the pairs into shards"

ELSEWHERE: Mapping[str, str] = {
    "learning_rate": "did you mean 'lr'?",
    "weight_decay": "did you mean 'wd'?",
    "lr_warmup": "did you mean 'warmup'? (in steps)",
    "warmup_steps": "did you mean 'warmup'? (in steps)",
    "num_epochs": "did you mean 'epochs'?",
    "optimizer": "did you mean 'opt'? (adamw, or timm/NAME)",
    "grad_clip": "did you mean 'grad_clip_norm'?",
    "gradient_clipping": "did you mean 'grad_clip_norm'?",
    "gradient_accumulation_steps": "did you mean 'accum_freq'?",
    "dtype": "did you mean 'precision'?",
    "augmentation": "did you mean 'aug_cfg'?",
    "val_path": "did you mean 'imagenet_val'?",
    "num_workers": "did you mean 'workers'? (loader processes of each worker)",
    "pretrained": "write init_from: {path: FILE}; it names the file and checks what was loaded",
    "pretrained_image": "write init_from: {path: FILE, key_map: ...} with the image tower's names",
    "resume": "leave it out: a trial goes on from its own newest checkpoint by itself; to start "
    "from weights alone, write init_from",
    "imagenet_v2": "write evaluations: [{kind: zero_shot, name: v2, path: FOLDER}]",
    "val_data": "write evaluations: [{kind: retrieval, path: SHARDS}]",
    "val_num_samples": "leave it out: an evaluation takes all pairs of its path",
    "val_frequency": "write every: N in the evaluation",
    "save_frequency": "write checkpoint_frequency, and keep_every for those kept for good",
    "save_most_recent": "leave it out: the last two checkpoints and the best one are kept",
    "delete_previous_checkpoint": "leave it out: the last two checkpoints and the best one are "
    "kept; keep_every keeps more",
    "dataset_resampled": "is not offered: shards drawn with replacement show some samples several "
    "times and others never; an epoch here holds each sample once",
    "train_data_upsampling_factors": "is not offered: name the shards of a source several times "
    "in train_data, joined with ::, to see it more often",
    "csv_img_key": _PAIRS,
    "csv_caption_key": _PAIRS,
    "csv_separator": _PAIRS,
    "distill_model": "is not offered: a teacher's loss is no part of this recipe",
    "distill_pretrained": "is not offered: a teacher's loss is no part of this recipe",
    "coca_caption_loss_weight": "is not offered: CoCa's loss is no part of this recipe",
    "coca_contrastive_loss_weight": "is not offered: CoCa's loss is no part of this recipe",
    "use_bnb_linear": "is not offered: 8-bit layers round otherwise at every step",
    "torchscript": "is not offered: write torchcompile: true",
    "trace": "is not offered: write torchcompile: true",
    "horovod": _RUN,
    "device": _RUN,
    "dist_url": _RUN,
    "dist_backend": _RUN,
    "no_set_device_rank": _RUN,
    "logs": _OWN,
    "log_local": _OWN,
    "name": _OWN,
    "log_every_n_steps": _OWN,
    "report_to": _OWN,
    "wandb_notes": _OWN,
    "wandb_project_name": _OWN,
    "debug": _OWN,
    "copy_codebase": _OWN,
    "cache_dir": "is no choice of a trial: set HF_HOME where it runs",
    "remote_sync": "write checkpoints: URL at the top of the study, where copies go",
    "remote_sync_frequency": "write checkpoints: URL at the top of the study, where copies go",
    "remote_sync_protocol": "write checkpoints: URL at the top of the study, where copies go",
}
"""Name -> the end of a sentence that begins with it."""
