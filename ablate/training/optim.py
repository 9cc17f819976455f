"""Which parameters are decayed, gradient norms, and optimizer state by parameter name.

Three rules say which parameters are not decayed:

``open_clip``
    open_clip_train 3.3.0 (main.py): fewer than two dimensions, or "bn", "ln", "bias" or
    "logit_scale" anywhere in the name
``open_clip_next``
    its development branch (src/open_clip_train/optim.py, make_wd_exclude, 2026): at most one
    dimension, or declared by a module's ``no_weight_decay()``; positional embeddings change sides
``timm``
    timm.optim.param_groups_weight_decay: at most one dimension, or a name that ends in ".bias"
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import NoneType
from typing import Any, Literal

import torch
from torch import nn

Rule = Literal["open_clip", "open_clip_next", "timm"]


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share their optimizer's settings."""

    name: str
    weight_decay: float
    parameters: tuple[tuple[str, nn.Parameter], ...]

    def for_optimizer(self) -> dict[str, Any]:
        parameters = [p for _, p in self.parameters]
        return {"params": parameters, "weight_decay": self.weight_decay, "name": self.name}


def group_parameters(model: nn.Module, *, rule: Rule, weight_decay: float) -> tuple[Group, Group]:
    """All trainable parameters, each in exactly one group: undecayed, decayed."""
    exclude = _RULES[rule](model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    undecayed = tuple((name, p) for name, p in trainable if exclude(name, p))
    decayed = tuple((name, p) for name, p in trainable if not exclude(name, p))
    return Group("no_decay", 0.0, undecayed), Group("decay", weight_decay, decayed)


def read_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Group, ...]:
    """The groups that an optimizer has, by their own names or by number; a parameter that the
    model does not have (of an optimizer built on a copy) is called after its shape."""
    names = {id(p): name for name, p in model.named_parameters()}
    return tuple(
        Group(
            group.get("name") or f"group_{number}",
            float(group.get("weight_decay", 0.0)),
            tuple((names.get(id(p), f"? {tuple(p.shape)}"), p) for p in group["params"]),
        )
        for number, group in enumerate(optimizer.param_groups)
    )


def set_rates(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set every group's rate to `lr`, times its ``lr_scale`` where it has one; `lr`, again.

    timm's layer-wise groups (``layer_decay``) come with an ``lr_scale``.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def refuse_uneven(model: nn.Module, groups: Iterable[Group]) -> None:
    """Raise ValueError unless every trainable parameter is in exactly one group."""
    seen = Counter(name for group in groups for name, _ in group.parameters)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    wrong = {name: seen[name] for name in sorted(trainable | set(seen)) if seen[name] != 1}
    if wrong:
        name, count = next(iter(wrong.items()))
        raise ValueError(
            f"{len(wrong)} trainable parameters are not in exactly one of the optimizer's groups, "
            f"{name} among them (in {count}): choose another param_groups or opt"
        )


def describe(groups: Iterable[Group]) -> dict[str, Any]:
    """Counts of each group, and a hash of who is in which: for the record."""
    content: dict[str, Any] = {}
    digest = hashlib.sha256()
    for group in groups:
        content[group.name] = {
            "weight_decay": group.weight_decay,
            "tensors": len(group.parameters),
            "parameters": sum(p.numel() for _, p in group.parameters),
        }
        digest.update(repr((group.name, [name for name, _ in group.parameters])).encode())
    content["hash"] = digest.hexdigest()[:12]
    return content


Exclude = Callable[[str, nn.Parameter], bool]


def _open_clip(model: nn.Module) -> Exclude:
    def exclude(name: str, p: nn.Parameter) -> bool:
        parts = ("bn", "ln", "bias", "logit_scale")
        return p.ndim < 2 or any(part in name for part in parts)

    return exclude


def _open_clip_next(model: nn.Module) -> Exclude:
    names: set[str] = set()
    patterns: list[str] = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        names |= {prefix + name for name in _declared(module, "no_weight_decay")}
        patterns += [prefix + glob for glob in _declared(module, "no_weight_decay_patterns")]
        patterns += [f"{prefix}*{word}" for word in _declared(module, "no_weight_decay_keywords")]

    def exclude(name: str, p: nn.Parameter) -> bool:
        return p.ndim <= 1 or name in names or any(fnmatchcase(name, glob) for glob in patterns)

    return exclude


def _declared(module: nn.Module, method: str) -> Iterable[str]:
    declared = getattr(module, method, None)
    return declared() if callable(declared) else ()


def _timm(model: nn.Module) -> Exclude:
    return lambda name, p: p.ndim <= 1 or name.endswith(".bias")


_RULES: Mapping[str, Callable[[nn.Module], Exclude]] = {
    "open_clip": _open_clip,
    "open_clip_next": _open_clip_next,
    "timm": _timm,
}


# --------------------------------------------------------------------------- measuring gradients


def module_group(name: str) -> str:
    """The part of the model that a parameter belongs to: a block of a tower, or a layer.

    ``visual.layer1.0.conv2.weight`` -> ``visual.layer1.0``; ``visual.conv1.weight`` ->
    ``visual.conv1``; ``logit_scale`` -> ``logit_scale``.
    """
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return ".".join(parts[:-1][:2]) or name


class _Groups:
    """Trainable parameters by :func:`module_group`, to add up what is known of each."""

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        owners = [module_group(name) for name, _ in named]
        self.names = tuple(dict.fromkeys(owners))
        numbers = {name: number for number, name in enumerate(self.names)}
        self._number = torch.tensor(
            [numbers[owner] for owner in owners], device=self.parameters[0].device
        )

    def norms(self, each: torch.Tensor) -> torch.Tensor:
        """Norm of each group from the norms of all parameters."""
        squares = torch.zeros(len(self.names), device=each.device)
        squares.index_add_(0, self._number, each.square())
        return squares.sqrt_()


class GradientNorms:
    """Norms of all gradients in one pass, whole and by :func:`module_group`."""

    def __init__(self, model: nn.Module) -> None:
        self._groups = _Groups(model)
        self.parameters = self._groups.parameters
        self.each = torch.ones(len(self.parameters))
        """Norm of each parameter's gradient at the last measurement; 0 where there was none."""

    def measure(self) -> torch.Tensor:
        """The global norm as a tensor on the device; no gradient counts as 0."""
        present = [p.grad for p in self.parameters if p.grad is not None]
        norms = list(torch._foreach_norm(present))
        if len(present) < len(self.parameters):
            found = iter(norms)
            zero = torch.zeros((), device=self.parameters[0].device)
            norms = [zero if p.grad is None else next(found) for p in self.parameters]
        self.each = torch.stack(norms).float()
        total: torch.Tensor = torch.linalg.vector_norm(self.each)
        return total

    def by_group(self) -> dict[str, torch.Tensor]:
        """``grad_norm/<group>`` of the last measurement."""
        norms = self._groups.norms(self.each).unbind()
        names = [f"grad_norm/{name}" for name in self._groups.names]
        return dict(zip(names, norms, strict=True))


class UpdateMeter:
    """How an AdamW-like optimizer moves the weights; sampled, and on the device.

    ``rms/<tensor>``
        sqrt(mean(g^2 / max(u, eps^2))) of watched tensors, u the de-biased second moment after
        the update: far above 1 when the second moment lags behind the gradient (Wortsman et al.
        2023, arXiv 2304.13013, appendix)
    ``update_ratio/<group>``
        norm of the update over norm of the weights
    ``eps_share``
        share of tensors whose sqrt(mean u) is below 10 eps, where eps rules the update
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, watched: Sequence[str]
    ) -> None:
        self._optimizer = optimizer
        self._groups = _Groups(model)
        self._watched = [
            (name, p)
            for name, p in model.named_parameters()
            if p.requires_grad and any(fnmatchcase(name, pattern) for pattern in watched)
        ]
        self._settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._before: list[torch.Tensor] | None = None
        self._last: list[torch.Tensor] | None = None

    def start(self) -> None:
        """Called before a step whose update is to be measured."""
        self._before = [p.detach().clone() for p in self._groups.parameters]

    def rms(self) -> dict[str, torch.Tensor]:
        """Of the watched tensors, after a step, while their gradients are there."""
        found = {}
        for name, p in self._watched:
            held = self._second_moment(p)
            if held is not None and p.grad is not None:
                second, correction = held
                eps = self._settings[id(p)]["eps"]
                # In place where the tensor is ours: these may be among the model's largest.
                unbiased = (second.float() / correction).clamp_min_(eps * eps)
                square = p.grad.float().square().div_(unbiased)
                found[f"rms/{name}"] = square.mean().sqrt()
        return found

    def norm(self) -> torch.Tensor:
        """Of the whole update of the step that :meth:`start` preceded."""
        assert self._before is not None
        now = [p.detach() for p in self._groups.parameters]
        moved = torch._foreach_norm(torch._foreach_sub(self._before, now))
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(moved).float())
        return norm

    def turn(self) -> torch.Tensor | None:
        """Cosine between the update of the step that :meth:`start` preceded and the one that this
        was last called after; None the first time. Keeps an update: for few steps in a row."""
        assert self._before is not None
        now = [p.detach() for p in self._groups.parameters]
        last, self._last = self._last, list(torch._foreach_sub(self._before, now))
        if last is None:
            return None
        products = [(a.float() * b).sum() for a, b in zip(self._last, last, strict=True)]
        norms = [
            torch.linalg.vector_norm(torch.stack(torch._foreach_norm(each)).float())
            for each in (self._last, last)
        ]
        cosine: torch.Tensor = torch.stack(products).sum() / (norms[0] * norms[1]).clamp_min(1e-30)
        return cosine

    def forget(self) -> None:
        """Let go of the update that :meth:`turn` kept."""
        self._last = None

    def finish(self) -> dict[str, torch.Tensor]:
        """After the step that :meth:`start` preceded."""
        assert self._before is not None
        weights = torch.stack(torch._foreach_norm(self._before)).float()
        torch._foreach_sub_(self._before, [p.detach() for p in self._groups.parameters])
        moved = torch.stack(torch._foreach_norm(self._before)).float()
        self._before = None
        ratios = self._groups.norms(moved) / self._groups.norms(weights).clamp_min_(1e-12)
        names = [f"update_ratio/{group}" for group in self._groups.names]
        found = dict(zip(names, ratios.unbind(), strict=True))
        shares = []
        for p in self._groups.parameters:
            held = self._second_moment(p)
            if held is not None:
                second, correction = held
                mean = second.mean(dtype=torch.float32) / correction
                shares.append(mean.sqrt() < 10 * self._settings[id(p)]["eps"])
        if shares:
            found["eps_share"] = torch.stack(shares).float().mean()
        return found

    def _second_moment(self, p: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As the optimizer has it, and what it is to be divided by to be free of bias; None for an
        optimizer without one."""
        # A parameter that the optimizer does not have, built on a copy, has neither.
        state, settings = self._optimizer.state.get(p, {}), self._settings.get(id(p), {})
        if "exp_avg_sq" not in state or "step" not in state:
            return None
        if "betas" not in settings or not isinstance(settings["eps"], float):
            return None  # Adafactor's: decays and bounds of its own
        return state["exp_avg_sq"], 1 - settings["betas"][1] ** state["step"]


class ZeroGradients:
    """For each parameter, steps in a row in which its gradient was exactly zero or absent, though
    nobody meant it to be."""

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = tuple(name for name, _ in named)
        device = named[0][1].device
        self.counts = torch.zeros(len(named), device=device)
        self._meant: dict[tuple[str, ...], torch.Tensor] = {}

    def update(self, norms: torch.Tensor, *, frozen: Collection[str] = ()) -> None:
        """`norms` of all parameters' gradients of a step, zero where there was none; `frozen` names
        those that were to have none."""
        missing = norms == 0
        if frozen:
            missing = missing & self._free(tuple(frozen))
        self.counts.add_(1).mul_(missing)

    def _free(self, frozen: tuple[str, ...]) -> torch.Tensor:
        """Which parameters are not frozen; on the device once, so that no step waits for it."""
        if frozen not in self._meant:
            free = [name not in frozen for name in self.names]
            self._meant[frozen] = torch.tensor(free, device=self.counts.device)
        return self._meant[frozen]


# --------------------------------------------------------------------------- state by name


def named_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state as ``parameter/quantity``: tensors, and plain numbers apart.

    By name, because torch's own state_dict goes by position, and a model with one parameter more
    would silently shift it. What an optimizer counts for a whole group, as timm's LAMB, Adan and
    Lookahead do, is ``param_groups.<n>/quantity``.

    Raises:
        ValueError: the optimizer keeps something that is neither.
    """
    content = optimizer.state_dict()
    names = _names_by_place(model, optimizer)
    found = {
        f"{names.get(place, place)}/{quantity}": value
        for place, state in content["state"].items()
        for quantity, value in state.items()
    }
    for number, group in enumerate(content["param_groups"]):
        for quantity, value in group.items():
            if quantity not in _SETTINGS and _is_counter(value, optimizer.defaults.get(quantity)):
                found[f"param_groups.{number}/{quantity}"] = value
    tensors = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    numbers = {key: value for key, value in found.items() if key not in tensors}
    for key, value in numbers.items():
        if not isinstance(value, (bool, int, float, str, NoneType)):
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key.rpartition('/')[2]} as a "
                f"{type(value).__name__}, which a checkpoint cannot hold; choose another opt"
            )
    return tensors, numbers


_SETTINGS = ("params", "lr", "lr_scale", "weight_decay")
"""Of a group: its own by configuration, whatever the optimizer's defaults."""


def _is_counter(value: Any, default: Any) -> bool:
    """Whether a group's value is one that steps have changed."""
    if isinstance(value, torch.Tensor):
        return True
    return isinstance(value, (bool, int, float)) and value != default


def _names_by_place(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Names of the parameters by their place in torch's state_dict; those that the model does not
    have (of an optimizer that was built on a copy) are left out."""
    names = {id(p): name for name, p in model.named_parameters()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    return {place: names[id(p)] for place, p in enumerate(ordered) if id(p) in names}


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of both states once training has begun.

    Takes a step to know it, with gradients of zero: for a model whose values do not matter.
    """
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tensors = (*model.state_dict().values(), *named_state(model, optimizer)[0].values())
    return sum(t.numel() * t.element_size() for t in tensors)


def load_named_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Restore what :func:`named_state` gave. Settings (lr, betas, decay) stay the optimizer's own.

    Each tensor comes back in the element type it was saved in and in its parameter's memory
    layout: torch's own load_state_dict casts the former and leaves the latter as the file has it,
    and a fused kernel walks through parameter and moments side by side in memory.

    Raises:
        ValueError: a name is no trainable parameter, or a shape differs.
    """
    content = optimizer.state_dict()
    places = {name: place for place, name in _names_by_place(model, optimizer).items()}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers.items()]:
        name, _, quantity = key.rpartition("/")
        if name in places:
            if isinstance(value, torch.Tensor) and not _belongs(value, parameters[name]):
                shape = tuple(parameters[name].shape)
                raise ValueError(f"{key}: shape {tuple(value.shape)}, not {shape}")
            state.setdefault(places[name], {})[quantity] = value
        elif name.startswith("param_groups."):
            content["param_groups"][int(name.removeprefix("param_groups."))][quantity] = value
        else:
            raise ValueError(f"optimizer state for {name!r}, which is no trainable parameter here")
    content["state"] = state
    optimizer.load_state_dict(content)
    restored = optimizer.state_dict()["state"]
    for name, place in places.items():
        held = restored.get(place, {})
        for quantity, cast in held.items():
            saved = tensors.get(f"{name}/{quantity}")
            if saved is not None:
                held[quantity] = _laid_out(saved, parameters[name], device=cast.device)


def _belongs(value: torch.Tensor, p: nn.Parameter) -> bool:
    """Whether a quantity of this shape may be of `p`: a factored moment has dimensions less, or of
    length 1."""
    return value.ndim != p.ndim or all(
        mine in (1, whole) for mine, whole in zip(value.shape, p.shape, strict=True)
    )


def _laid_out(value: torch.Tensor, p: nn.Parameter, *, device: torch.device) -> torch.Tensor:
    """A copy of `value` on `device`, in the memory layout of `p` where it has its shape."""
    if value.shape != p.shape:
        return value.to(device, copy=True)
    return torch.empty_like(p, dtype=value.dtype, device=device, requires_grad=False).copy_(value)


def trainable(parameters: Sequence[nn.Parameter]) -> int:
    """Numbers in these parameters."""
    return sum(p.numel() for p in parameters if p.requires_grad)
