"""What is minimised when answers are compared: formulas from log-probabilities to losses.

Letters: P pairs of a chosen and a rejected answer, or single answers. An answer's log-probability
is the sum over its tokens. The objective of a step is the mean of the losses over all of its rows,
wherever they are computed, and weight * (mean over the tokens of all chosen answers of -log p).
"""

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from fsdp_qlora import atomic, config


class Answers(NamedTuple):
    """One answer of each of P prompts.

    Attributes:
        policy_P: log-probability by the model in training, float32, with its graph.
        reference_P: by the model that it is compared with; zeros where there is none.
        length_P: tokens of the answer, float32.
    """

    policy_P: Tensor
    reference_P: Tensor
    length_P: Tensor

    @property
    def ratio_P(self) -> Tensor:
        """log(policy / reference)."""
        return self.policy_P - self.reference_P

    @property
    def mean_P(self) -> Tensor:
        """Log-probability of a token of the answer, by the policy."""
        return self.policy_P / self.length_P


class Strength(NamedTuple):
    """The numbers in the formulas.

    Attributes:
        beta: how strongly the policy is held to the reference (ORPO: weight of the odds ratio).
        gamma: margin of SimPO's rewards, as they are: not divided by beta.
        smoothing: share of pairs whose answers are taken to be in the wrong order.
    """

    beta: float
    gamma: float = 0.0
    smoothing: float = 0.0


def dpo(chosen: Answers, rejected: Answers, by: Strength) -> Tensor:
    """-log sigmoid(beta * margin). Source: DPO, arXiv 2305.18290, equation 7."""
    return -logsigmoid(by.beta * (chosen.ratio_P - rejected.ratio_P))


def hinge(chosen: Answers, rejected: Answers, by: Strength) -> Tensor:
    """max(0, 1 - beta * margin). Source: SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657."""
    return relu(1 - by.beta * (chosen.ratio_P - rejected.ratio_P))


def ipo(chosen: Answers, rejected: Answers, by: Strength) -> Tensor:
    """(margin of a token - 1 / (2 beta))^2.

    Source: IPO, arXiv 2310.12036, equation 17; the mean over tokens is its authors' own, as in TRL.
    """
    margin_P = chosen.ratio_P / chosen.length_P - rejected.ratio_P / rejected.length_P
    return (margin_P - 1 / (2 * by.beta)).square()


def robust(chosen: Answers, rejected: Answers, by: Strength) -> Tensor:
    """DPO's loss without bias where a share of the pairs is in the wrong order.

    Source: robust DPO, arXiv 2403.00409, equation 12.
    """
    margin_P, flipped = by.beta * (chosen.ratio_P - rejected.ratio_P), by.smoothing
    loss_P = flipped * logsigmoid(-margin_P) - (1 - flipped) * logsigmoid(margin_P)
    return loss_P / (1 - 2 * flipped)


def apo_zero(chosen: Answers, rejected: Answers, by: Strength) -> Tensor:
    """Chosen answers up, rejected ones down. Source: APO, arXiv 2408.06266, equation 7."""
    up_P, down_P = by.beta * chosen.ratio_P, by.beta * rejected.ratio_P
    return 1 - up_P.sigmoid() + down_P.sigmoid()


def apo_down(chosen: Answers, rejected: Answers, by: Strength) -> Tensor:
    """Both down, rejected ones further. Source: APO, arXiv 2408.06266, equation 8."""
    margin_P = by.beta * (chosen.ratio_P - rejected.ratio_P)
    return (by.beta * chosen.ratio_P).sigmoid() + 1 - margin_P.sigmoid()


def orpo(chosen: Answers, rejected: Answers, by: Strength) -> Tensor:
    """-beta * log sigmoid(log odds ratio), odds p / (1 - p) of the geometric mean over tokens.

    Source: ORPO, arXiv 2403.07691, equations 4 and 7.
    """
    odds_P = chosen.mean_P - _log1mexp(chosen.mean_P)
    return -by.beta * logsigmoid(odds_P - rejected.mean_P + _log1mexp(rejected.mean_P))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, by the form that loses no digits.

    Source: M. Maechler, Accurately Computing log(1 - exp(-|a|)), 2012.
    """
    is_small = x > -0.6931471805599453
    near, far = x.where(is_small, -0.5), x.where(~is_small, -1.0)  # no NaN in a gradient
    return torch.where(is_small, (-near.expm1()).log(), (-far.exp()).log1p())


def cpo(chosen: Answers, rejected: Answers, by: Strength) -> Tensor:
    """DPO's loss without a reference. Source: CPO, arXiv 2401.08417, equation 3."""
    return -logsigmoid(by.beta * (chosen.policy_P - rejected.policy_P))


def simpo(chosen: Answers, rejected: Answers, by: Strength) -> Tensor:
    """-log sigmoid(beta * margin of a token - gamma). Source: SimPO, arXiv 2405.14734, eq. 6."""
    return -logsigmoid(by.beta * (chosen.mean_P - rejected.mean_P) - by.gamma)


def kto(answers: Answers, sign_P: Tensor, divergence: Tensor, by: Strength) -> Tensor:
    """1 - sigmoid(sign * beta * (ratio - divergence)); with a divergence of 0 it is APO-zero's.

    Args:
        answers: desirable and undesirable ones.
        sign_P: 1 of the former, -1 of the latter.
        divergence: see `divergence`; 0-d.
        by: the numbers.

    Source: KTO, arXiv 2402.01306, equation 7; APO, arXiv 2408.06266, as TRL has it for one answer.
    """
    return 1 - (by.beta * sign_P * (answers.ratio_P - divergence)).sigmoid()


def divergence(ratio_sum: Tensor, num: float) -> Tensor:
    """KTO's estimate of KL(policy || reference): no gradient passes it, it is never below 0.

    Args:
        ratio_sum: of log(policy / reference) of `num` prompts with the answer of another one.
        num: those of all ranks and micro-batches of a step.

    Source: KTO, arXiv 2402.01306, section 4.2.
    """
    return (ratio_sum.detach() / num).clamp_min(0.0)


FIGURES: tuple[str, ...] = ("rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected")
FIGURES += ("accuracy", "margin", "kl")  # of a step in the record; kl of KTO alone
PAIRED: dict[str, Callable[[Answers, Answers, Strength], Tensor]] = {
    f.__name__: f for f in (dpo, hinge, ipo, robust, apo_zero, apo_down, orpo, cpo, simpo)
}


@dataclass(frozen=True)
class KnownReference:
    """Log-probabilities by the reference that were computed before the first step.

    Args:
        hashes: uint64, sorted, of the samples.
        values: float32 [samples, rows of each].
    """

    hashes: np.ndarray
    values: np.ndarray

    def of(self, hashes: np.ndarray) -> Tensor:
        """Those of some samples, row after row.

        Args:
            hashes: of samples that are known.
        """
        return torch.from_numpy(self.values[np.searchsorted(self.hashes, hashes)].reshape(-1))

    def write(self, place: Path) -> None:
        """Write a file whole or not at all."""
        file = io.BytesIO()
        np.savez(file, hashes=self.hashes, values=self.values)
        atomic.write(place, file.getvalue())

    @classmethod
    def read(cls, place: Path, wanted: np.ndarray) -> "KnownReference | None":
        """Read what `write` has written; None where it is not there or not of all samples.

        Args:
            place: the file.
            wanted: hashes of samples.
        """
        try:
            with np.load(place, allow_pickle=False) as file:
                found = cls(file["hashes"], file["values"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return found if np.isin(wanted, found.hashes).all() else None


@dataclass(frozen=True)
class Preference:
    """A preference objective of a run.

    Args:
        name: row of OBJECTIVES.
        by: the numbers in its formula.
        nll_weight: of the mean cross entropy of chosen answers.
        is_live: the reference is computed at every step.
        known: else what is known of it; None where there is none.
        can_visit: see QuantizedModel.can_visit.
    """

    name: str
    by: Strength
    nll_weight: float = 0.0
    is_live: bool = False
    known: KnownReference | None = None
    can_visit: bool = False

    @classmethod
    def of(cls, cfg: config.TrainConfig, can_visit: bool) -> "Preference | None":
        """That of a run; None where rows are learned as they are."""
        if not cfg.num_answers:
            return None
        by = Strength(cfg.beta, cfg.simpo_gamma, cfg.label_smoothing)
        is_live = config.OBJECTIVES[cfg.objective].has_reference and not cfg.has_cached_reference
        return cls(cfg.objective, by, cfg.nll_weight, is_live, None, can_visit)

    def compare(
        self, rows: Answers, sign_R: Tensor | None, divergence: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses of a batch, and the sums that `figures` makes means of.

        Args:
            rows: chosen, rejected, chosen ...; or single answers.
            sign_R: of single ones, see `kto`; None: they are pairs.
            divergence: see `kto`.

        Returns:
            Sum of the losses, 0-d; [8], without gradient.

        Source of the rewards: DPO, arXiv 2305.18290, section 5; those of ORPO and SimPO are means
            over tokens, as in TRL. Equal rewards are half right.
        """
        is_mean = self.name in ("orpo", "simpo")
        worth_R = self.by.beta * (rows.mean_P if is_mean else rows.ratio_P).detach()
        if sign_R is None:
            chosen, rejected = (Answers(*(part[i::2] for part in rows)) for i in (0, 1))
            loss_P = PAIRED[self.name](chosen, rejected, self.by)
            margin_P = worth_R[::2] - worth_R[1::2]
            sign_R = 1 - torch.arange(len(worth_R), device=worth_R.device) % 2 * 2.0
        else:
            loss_P = kto(rows, sign_R, divergence, self.by)
            margin_P = sign_R * (worth_R - self.by.beta * divergence)
        good_R, bad_R = (sign_R > 0).float(), (sign_R < 0).float()
        logs_R, num = rows.policy_P.detach(), torch.full_like(divergence, len(loss_P))
        sums = [(part * side).sum() for part in (worth_R, logs_R) for side in (good_R, bad_R)]
        sums += [(1 + margin_P.sign()).sum() / 2, good_R.sum(), bad_R.sum(), num]
        return loss_P.sum(), torch.stack(sums)

    def figures(self, sums: Tensor) -> dict[str, Tensor]:
        """Means for the record.

        Args:
            sums: of `compare`, over all batches and ranks.
        """
        good, bad, num = sums[5:].clamp_min(1.0)
        means = sums[:5] / torch.stack([good, bad, good, bad, num])
        found = dict(zip(FIGURES, means, strict=False))
        return {**found, "margin": found["rewards_chosen"] - found["rewards_rejected"]}
