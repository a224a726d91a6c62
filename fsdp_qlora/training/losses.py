"""Losses of batches: of tokens, of preferences, and whether rows that lie together stay apart."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.data.batches import Batch, Batches, PackedBatches, branch, cut, flatten, join
from fsdp_qlora.data.tokens import Sample
from fsdp_qlora.distributed import hooks
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.model import head, shard, skeleton, visit
from fsdp_qlora.model.attention import Branches, Cut, RowBounds, joins_exactly
from fsdp_qlora.planning.sizes import JOINED_TOKENS
from fsdp_qlora.training import objectives, optim
from fsdp_qlora.training.objectives import Answers, KnownReference, Preference

SHORT_ROWS = (9, 7)  # tokens of two rows that are laid one after the other for a trial
MOST_ROW_ERROR = 0.2  # of what seeing the other row does; 16 bit round to some hundredths of it


def token_loss_sum(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Sum of the cross entropy over the trained tokens of a batch.

    Args:
        model: a QuantizedModel.
        batch: on the host.
        device: of this rank.

    Returns:
        0-d float32 on the device, with its graph.
    """
    group = _group(batch, device)
    return model(group.input_ids, group.targets, rows=group.rows)


def token_losses(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> Tensor:
    """`token_loss_sum` of batches that pass each layer together, where there are several.

    Args:
        model, batches, device: see there.

    Returns:
        [batches], float32; of those that a GPU takes as one, one figure.
    """
    if device.type == "cuda" and batches[0].branches is None:
        batches = join(batches, JOINED_TOKENS)
    if len(batches) == 1:
        return token_loss_sum(model, batches[0], device).unsqueeze(0)
    return torch.stack(model([_group(batch, device) for batch in batches]))


class StepWeights(NamedTuple):
    """What the losses of a step of all ranks are weighed by.

    Attributes:
        num: trained tokens; of preferences rows of the data.
        nll: factor of the cross entropy of chosen answers, a token.
        divergence: of KTO, else 0; 0-d on the device.
        copies: ranks that count the same rows, each with the gradient of its own tokens.
    """

    num: float
    nll: float = 0.0
    divergence: Tensor | None = None
    copies: int = 1


def weigh(
    model: nn.Module, preference: Preference | None, batches: Sequence[Batch], world: World
) -> StepWeights:
    """Find the weights of a step, or of an evaluation.

    Args:
        model: a QuantizedModel.
        preference: see Trained.
        batches: this rank's, of the whole step.
        world: the ranks; all must call.
    """
    if preference is None:
        return StepWeights(max(world.sum(sum(b.num_trained_tokens for b in batches)), 1.0))
    sides = [batch.sides for batch in batches if batch.sides is not None]
    num_tokens = sum(sum(s.counts[::2]) for s in sides)
    every = world.gather_objects((sum(len(s.hashes) for s in sides), num_tokens))
    num, num_tokens = (max(sum(column), 1.0) for column in zip(*every, strict=True))
    ratios = torch.zeros((), device=world.device)
    live = dataclasses.replace(preference, is_live=True)  # these rows are never the same
    for other in (batch.mismatched for batch in batches if batch.mismatched is not None):
        with torch.no_grad():
            ((answers, _),) = _answers(model, live, [other], world.device)
        ratios += answers.ratio_P.sum()
    ratios = world.sum_(ratios) if preference.name == "kto" else ratios
    divergence = objectives.divergence(ratios, num)
    copies = world.context.size if world.context is not None else 1
    return StepWeights(num, preference.nll_weight * num / num_tokens, divergence, copies)


def compare(
    model: nn.Module,
    preference: Preference,
    batches: Sequence[Batch],
    weights: StepWeights,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Losses of batches of preferences that pass each layer together.

    Args:
        model: a QuantizedModel.
        preference: what is minimised.
        batches: this rank's, on the host.
        weights: of their step.
        device: of this rank.

    Returns:
        [batches], to be divided by `weights.num`, with their graph; sums, see Preference.compare.
    """
    losses, sums = [], torch.zeros(8, device=device)
    divergence = sums[0] if weights.divergence is None else weights.divergence
    pairs = zip(batches, _answers(model, preference, batches, device), strict=True)
    for batch, (answers, nll) in pairs:
        signs = batch.sides.signs if batch.sides is not None else ()
        sign_R = _to_device(torch.tensor(signs), device).float() if signs else None
        loss, own = preference.compare(answers, sign_R, divergence)
        losses.append(loss + weights.nll * nll)
        sums = sums + own
    return torch.stack(losses), sums


def step_losses(
    trained: optim.Trained, batches: Sequence[Batch], weights: StepWeights
) -> tuple[Tensor, Tensor | None]:
    """`token_losses`, or `compare` and its sums.

    Args:
        trained: model, preference, world.
        batches, weights: of a step.
    """
    device = trained.world.device
    if trained.preference is None:
        return token_losses(trained.model, batches, device), None
    return compare(trained.model, trained.preference, batches, weights, device)


def _answers(
    model: nn.Module, preference: Preference, batches: Sequence[Batch], device: torch.device
) -> list[tuple[Answers, Tensor]]:
    """The answers in each batch, and the summed cross entropy of the chosen rows."""
    found = _single_losses(model, [_group(batch, device) for batch in batches], preference)
    made = []
    for batch, losses_N, by_base_N in zip(batches, *found, strict=True):
        losses_N = _whole(model, batch, losses_N)
        by_base_N = by_base_N if by_base_N is None else _whole(model, batch, by_base_N)
        sides = batch.sides
        assert sides is not None
        parts, length = losses_N.split(sides.counts), torch.tensor(sides.counts).float()
        nll = torch.stack([losses_N.sum() * 0, *(part.sum() for part in parts[::2])]).sum()
        if sides.is_answer is not None:
            parts = (losses_N * _to_device(sides.is_answer, device)).split(sides.counts)
            length = torch.stack([p.sum() for p in sides.is_answer.split(sides.counts)]).float()
        policy_R = -torch.stack([part.sum() for part in parts] or [losses_N.sum()])[: len(parts)]
        reference_R = torch.zeros_like(policy_R)
        if by_base_N is not None and sides.counts:
            reference_R = -torch.stack([part.sum() for part in by_base_N.split(sides.counts)])
        elif preference.known is not None and len(sides.hashes):
            reference_R = _to_device(preference.known.of(sides.hashes), device)
        made.append((Answers(policy_R, reference_R, _to_device(length, device)), nll))
    return made


def _whole(model: nn.Module, batch: Batch, losses_N: Tensor) -> Tensor:
    """Losses of all targets of rows that are cut; the gradient is that of this rank's."""
    laid, context = batch.branches, cast(skeleton.QuantizedModel, model).context
    if context is None or laid is None or laid.numbers is None or batch.sides is None:
        return losses_N
    numbers = _to_device(laid.numbers, losses_N.device)
    mine = losses_N.new_zeros(sum(batch.sides.counts)).index_put((numbers,), losses_N)
    own = mine.detach()
    return mine + (context.sum_(own.clone()) - own)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which a model evaluates, without gradients; its mode is afterwards as it was."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)


def reference_of(
    model: skeleton.QuantizedModel,
    preference: Preference,
    batches: Iterable[Batch],
    world: World,
    is_base: bool,
) -> KnownReference:
    """Compute the log-probabilities of all answers before anything is trained.

    Args:
        model: filled.
        preference: that of the run.
        batches: this rank's, as many on every rank; together all samples.
        world: the ranks; all must call.
        is_base: the reference is the model without its adapters.
    """
    found = list[tuple[np.ndarray, np.ndarray]]()
    alone = dataclasses.replace(preference, is_live=False, known=None)
    with evaluating(model), model.bare() if is_base else contextlib.nullcontext():
        for batch in batches:
            hooks.reach("eval", world.rank)
            ((answers, _),) = _answers(model, alone, [batch], world.device)
            assert batch.sides is not None
            if len(hashes := batch.sides.hashes):
                found.append((hashes, answers.policy_P.cpu().numpy().reshape(len(hashes), -1)))
    every = [pair for own in world.gather_objects(found) for pair in own]
    hashes, order = np.unique(np.concatenate([pair[0] for pair in every]), return_index=True)
    return KnownReference(hashes, np.concatenate([pair[1] for pair in every])[order])


def _group(batch: Batch, device: torch.device) -> visit.RowGroup:
    targets = head.Targets.of(batch.labels, device)._replace(is_single=batch.sides is not None)
    rows, laid = RowBounds.of(batch.row_lengths, device), batch.branches
    if laid is not None and rows is not None:
        places = laid.positions, laid.tokens, laid.position_ids
        positions, tokens_N, position_ids = (_to_device(t, device) for t in places)
        targets = targets._replace(positions_N=positions, tokens_N=tokens_N)
        rows = rows._replace(position_ids=position_ids)
        if laid.chunks is None:
            rows = Branches.join(rows, laid.prompts, laid.answers)
        else:
            rows = rows._replace(cut=Cut.of(batch.row_lengths, laid.chunks, device))
    return visit.RowGroup(_to_device(batch.input_ids, device), targets, rows)


def _single_losses(
    model: nn.Module, groups: list[visit.RowGroup], preference: Preference
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Losses of all tokens of each group, and the same by the base where that is the reference."""
    assert isinstance(model, skeleton.QuantizedModel)
    num, is_live = len(groups), preference.is_live
    if preference.can_visit and num * (1 + is_live) > 1:
        bare = [group._replace(has_adapters=False) for group in groups] if is_live else []
        outs = model([*groups, *bare])
        return outs[:num], outs[num:] or [None] * num
    by_base: list[Tensor | None] = [None] * num
    if is_live:
        with model.bare():
            by_base = [model(group.input_ids, group.targets, rows=group.rows) for group in groups]
    return [model(group.input_ids, group.targets, rows=group.rows) for group in groups], by_base


def keep_rows_apart(model: nn.Module, batches: Batches, info: ModelInfo, world: World) -> str:
    """Lay no rows one after the other where they would see each other; share prompts of pairs.

    Args:
        model: filled.
        batches: of the run; padded from now on where that is needed.
        info: the model.
        world: the ranks; all must call.

    Returns:
        One line for the user, or "".

    Raises:
        UserError: --packing on, and they would; or rows cannot be cut over ranks (code 2).
    """
    if world.context is not None:
        check_cut_rows(model, info, world)
        return ""
    if not batches.is_flat or are_rows_apart(model, world):
        is_pair = batches.is_flat and batches.samples.num_sides == 2
        batches.shares_prompts = is_pair and can_share_prompts(model, world)
        return "prompts   computed once for both answers of a pair" * batches.shares_prompts
    rule = f"rows of a {info.model_type} model that lie one after the other see each other"
    if isinstance(batches, PackedBatches):
        raise UserError("--packing on", rule, "use --packing off")
    batches.is_flat = False
    return f"packing   off: {rule}"


def are_rows_apart(model: nn.Module, world: World) -> bool:
    """Whether a short row behind another one has the logits that it has alone.

    Args:
        model: a QuantizedModel, filled.
        world: the ranks; all must call.
    """
    # Llama 4 scales queries by their place in the sequence, from the 8192nd on.
    if getattr(model.get_submodule("decoder").config, "attn_temperature_tuning", False):
        return False
    ids = _trial_ids(model).to(world.device)
    rows = RowBounds.of(SHORT_ROWS, world.device)
    positions = torch.arange(SHORT_ROWS[1], device=world.device)
    with evaluating(model):
        alone = model(ids[:, SHORT_ROWS[0] :], head.Targets(positions, None)).float()
        behind = head.Targets(positions + SHORT_ROWS[0], None)
        seeing = model(ids, behind).float() - alone
        try:
            apart = model(ids, behind, rows=rows).float() - alone
        except ValueError:  # transformers: recurrent layers need kernels that are not installed
            apart = seeing
    shard.settle(model)
    # A median, because a rounding can send a token to another expert.
    error = (apart.norm(dim=1) / seeing.norm(dim=1)).median().item()
    return world.sum(float(error > MOST_ROW_ERROR)) == 0


def check_cut_rows(model: nn.Module, info: ModelInfo, world: World) -> None:
    """Compare two short rows, one after the other and cut over ranks, with each by itself.

    Args:
        model: a QuantizedModel, filled.
        info: the model.
        world: the ranks, with `context`; all must call.

    Raises:
        UserError: their logits differ: layers hand on more than keys and values (code 2).
    """
    ranks, worst = world.context, 1.0
    assert ranks is not None
    ids = _trial_ids(model)
    rows = [Sample(row.numpy(), np.ones(len(row), bool)) for row in ids[0].split(SHORT_ROWS)]
    whole = flatten(rows, 8)
    numbered = dataclasses.replace(whole, input_ids=torch.arange(ids.shape[1]).unsqueeze(0))
    at, part = (cut(batch, ranks.size, ranks.rank) for batch in (numbered, whole))
    group, laid = _group(part, world.device), part.branches
    assert laid is not None and group.targets is not None
    with evaluating(model), visit.may_refuse():
        asked = (head.Targets(torch.arange(num, device=world.device), None) for num in SHORT_ROWS)
        pairs = zip(ids.to(world.device).split(SHORT_ROWS, 1), asked, strict=True)
        alone = torch.cat([model(row, targets).float() for row, targets in pairs])
        wanted = alone[at.input_ids[0, laid.positions]]
        found = model(group.input_ids, group.targets._replace(tokens_N=None), rows=group.rows)
        errors = _errors(found.float(), wanted)
        is_late = laid.positions >= part.input_ids.shape[1] // 2
        worst = max(errors[where].median().item() for where in (is_late, ~is_late))
    shard.settle(model)
    if world.sum(float(worst > MOST_ROW_ERROR)):
        rule = f"{info.model_type} computes another attention, or needs more than keys and values"
        raise UserError(f"--context_parallel {ranks.size}", rule, "use --context_parallel 1")


def can_share_prompts(model: nn.Module, world: World) -> bool:
    """Whether two answers that go on from one prompt have the logits of two whole rows.

    Args:
        model: a QuantizedModel, filled.
        world: the ranks; all must call.
    """
    random, first, second = np.random.default_rng(0), sum(SHORT_ROWS), sum(SHORT_ROWS) + 5
    vocab_size = model.get_parameter("head.weight").shape[0]
    ids = random.integers(vocab_size, size=second, dtype=np.int32)
    pair = Sample(ids, np.arange(second) >= SHORT_ROWS[0], SHORT_ROWS[0], first)
    laid = flatten(pair.rows(), 8), branch([pair], 8, learns_prompt=False)
    found = list[Tensor]()
    with evaluating(model), visit.may_refuse():  # a model may know no branches
        is_exact = joins_exactly(world.device, cast(skeleton.QuantizedModel, model).kernels.dtype)
        for group in (_group(batch, world.device) for batch in laid if is_exact):
            asked = group.targets._replace(tokens_N=None) if group.targets is not None else None
            found.append(model(group.input_ids, asked, rows=group.rows).float())
    shard.settle(model)
    if len(found) < 2:
        return world.sum(1.0) == 0
    parts = _errors(found[1], found[0]).split((SHORT_ROWS[1], 5))
    return world.sum(float(max(part.median().item() for part in parts) > MOST_ROW_ERROR)) == 0


def _trial_ids(model: nn.Module) -> Tensor:
    """Random tokens of SHORT_ROWS, one row after the other, the same on every rank."""
    vocab_size, generator = model.get_parameter("head.weight").shape[0], torch.Generator()
    return torch.randint(vocab_size, (1, sum(SHORT_ROWS)), generator=generator.manual_seed(0))


def _errors(found_NV: Tensor, wanted_NV: Tensor) -> Tensor:
    """How far the logits of each token are off, as a share of their distance to a neighbour's."""
    return (found_NV - wanted_NV).norm(dim=1) / (wanted_NV - wanted_NV.roll(1, 0)).norm(dim=1)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def figures(
    preference: Preference | None, sums: Tensor, weights: StepWeights, world: World
) -> dict[str, Any]:
    """What the record has of a preference besides the loss.

    Args:
        preference: see Trained.
        sums, weights: of a step, or of an evaluation.
        world: the ranks; all must call.
    """
    if preference is None:
        return {}
    kl = {"kl": weights.divergence} if preference.name == "kto" else {}
    return preference.figures(world.sum_(sums)) | kl
