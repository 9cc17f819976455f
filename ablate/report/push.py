"""An exported model where others find it: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from ablate.errors import AnalysisError

HUB = "hf:"


def push_model(model: Path, target: str) -> str:
    """Write what a repository of this model holds to a folder, or upload it to ``hf:OWNER/NAME``.

    Where it is now. The folder gets the same files as the repository: weights, architecture,
    recorded features and the card.

    Raises:
        AnalysisError: the folder holds something else, or the upload failed.
    """
    names = sorted(path.name for path in model.iterdir() if path.is_file())
    if target.startswith(HUB):
        return _upload(model, target.removeprefix(HUB), names)
    folder = Path(target)
    others = {path.name for path in folder.iterdir()} - set(names) if folder.is_dir() else set()
    if others:
        raise AnalysisError(
            f"{folder} holds other files ({', '.join(sorted(others)[:4])}). Give an empty folder, "
            f"or {HUB}OWNER/NAME"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(model / name, folder / name)
    return str(folder)


def _upload(model: Path, name: str, files: list[str]) -> str:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        made = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            folder_path=model, repo_id=made.repo_id, allow_patterns=files,
            commit_message="Exported by ablate",
        )  # fmt: skip
    except Exception as error:  # of the network, the login, the name
        raise AnalysisError(
            f"{HUB}{name} was not uploaded: {type(error).__name__}: {str(error).splitlines()[0]}. "
            "Log in with `hf auth login`, or write the same files to a folder: --push-to FOLDER"
        ) from error
    return str(made)
