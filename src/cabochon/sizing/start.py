"""What a program that loads a model chooses where its user said nothing, so that it starts instead of failing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import ModelConfig
from ..errors import InputError
from ..formats import QUANTIZED
from ..kv.layout import CacheDtype
from .hardware import Hardware
from .memory import Workload, encoder
from .plan import MARGIN, MemoryPlan, Sizer, plan
from .units import kilo

COMFORT = 8192
"""Tokens of context for which a finer format is given up, and for which users are counted."""
LEAST = 1024
"""Tokens of context under which a model is not worth loading."""
MOST_USERS = 64
"""Replies at once that are planned for when nobody says."""


@dataclass(frozen=True, slots=True)
class Start:
    """The choices, and the plan that they come from (for conversations of usual length)."""

    quantization: str | None
    context: int
    """Longest conversation: what `max_model_len` should be."""
    users: int
    """Replies at once: what `max_num_seqs` should be."""
    cache_bytes: int
    """What pages may take. On a GPU all that is left; on a CPU, whose memory others want too, what the plan needs."""
    plan: MemoryPlan

    def summary(self) -> str:
        """Five lines for the start of a program."""
        lines = self.plan.summary().splitlines()
        lines[1] += f"; one can have {kilo(self.context)}"
        return "\n".join(lines)


def start(
    config: ModelConfig,
    hardware: Hardware,
    *,
    name: str,
    drafter: ModelConfig | None = None,
    dtype: str | None = None,
    formats: tuple[str | None, ...] = (None, *QUANTIZED),
    kept: frozenset[str] = frozenset(),
    context: int | None = None,
    users: int | None = None,
    kv_cache_dtype: CacheDtype = "auto",
    available: int | None = None,
) -> Start:
    """What to load and how. What is given stays; what is None is chosen, the mildest that fits.

    `formats` are those that may be taken, the finest first; None is the type that the model runs in, but for the
    matrices in `kept`, which the file brings as int4. The format is the
    finest in which one user has the context (8k when none was given), the context the longest that
    one user can have, the users as many as fit at 8k (or at the context, if that is less), up to 64.

    Raises:
        InputError: not even the coarsest format leaves room; the message has the numbers and what would help.
    """
    set_aside = encoder(config, dtype or config.dtype)  # pictures come without having been planned for
    usable = int((available or hardware.memory) * (1 - MARGIN)) - set_aside
    sizer = Sizer(config, drafter, 0, hardware, usable)
    longest = config.text.max_position_embeddings
    asked = Workload(
        context=min(longest, context or COMFORT),
        users=users or 1,
        kept=kept,
        dtype=dtype or config.dtype,
        kv_cache_dtype=kv_cache_dtype,
        drafter=drafter is not None,
    )
    works = [replace(asked, quantization=format) for format in formats]
    work = next((each for each in works if sizer.fits(replace(each, users=1))), works[-1])
    reach = sizer.longest_context(work)
    if reach < min(context or LEAST, longest):
        made = plan(config, hardware, replace(work, users=1), available=available, name=name, drafter=drafter)
        raise InputError(f"{name} can't be loaded here: {made.verdict}; what would help: {made.advice}")
    work = replace(work, context=min(reach, COMFORT, context or reach))
    seats = users or max(1, min(MOST_USERS, sizer.most_users(work)))
    most = replace(work, users=min(seats, sizer.most_users(work)))
    made = plan(config, hardware, most, available=available, name=name, drafter=drafter)
    alone = sizer.memory(replace(work, users=1, context=context or reach))
    left = usable - (alone.total - alone.pool - alone.snapshots)
    needed = max(made.memory.pool + made.memory.snapshots, alone.pool + alone.snapshots)
    return Start(
        quantization=work.quantization,
        context=context or reach,
        users=seats,
        cache_bytes=left if hardware.kind == "gpu" else min(left, needed),
        plan=made,
    )
