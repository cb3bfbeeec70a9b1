"""The launches that select boxes: exact top-k of the candidates, sorting, non-maximum suppression."""

from __future__ import annotations

from dataclasses import dataclass, field

from trt_plugins.operator import Buffer, KernelSpec, Launch, Workspace, power_of_two

KERNELS = "trt_plugins.selection.kernel"
LARGEST_CHUNK = 2**13
"""The most candidates of one program: 16 per thread, because more do not fit the registers."""
LARGEST_K = LARGEST_CHUNK // 2
RANKED = 2048
"""Rows up to this width are sorted by comparing all with all; wider rows are first reduced by `top_k`."""
RANKED_BLOCK = 32
"""Candidates that a program ranks."""
COMPARED_BLOCK = 128
"""Candidates that they are compared with at a time."""
OVERLAPS_BLOCK = 64


@dataclass(frozen=True)
class Selection:
    """`rows` independent sets of `width` candidates: the `k` best of each are sorted, and go through NMS.

    An operator's own kernels write the candidates (`entries`), sort and decode them (`ranked` -> `boxes`, `best_keys`, `best_indices`),
    and write the outputs from the kept ones (`kept_keys`, `kept_counts`). NMS compares boxes whose indices agree modulo `groups`.
    `workspace` is the scratch memory for all of this.
    """

    rows: int
    width: int
    k: int
    groups: int
    workspace: Workspace = field(default_factory=Workspace)

    def __post_init__(self) -> None:
        for index, width in enumerate(self.widths):
            self.workspace.take(f"keys {index}", self.rows * width, "int32")
            self.workspace.take(f"indices {index}", self.rows * width, "int32")
        self.workspace.take("boxes", self.rows * 4 * self.k, "float32")
        for name in ("best_keys", "best_indices", "kept_keys"):
            self.workspace.take(name, self.rows * self.k, "int32")
        self.workspace.take("better", self.rows * self.words * self.k, "int32")
        self.workspace.take("kept_counts", self.rows, "int32")

    def part(self, name: str) -> Buffer:
        """`boxes [rows, 4, k] float32`, `best_keys`, `best_indices`, `kept_keys` (`[rows, k] int32`), or `kept_counts [rows] int32`."""
        return self.workspace.parts[name]

    @property
    def entries(self) -> tuple[Buffer, Buffer]:
        """The buffers for the candidates' keys and indices, `[rows, width] int32`, which the operator writes."""
        return self.part("keys 0"), self.part("indices 0")

    @property
    def ranked(self) -> tuple[Buffer, Buffer, int]:
        """Keys and indices `[rows, width] int32` that remain to be sorted, and their width."""
        last = len(self.widths) - 1
        return self.part(f"keys {last}"), self.part(f"indices {last}"), self.widths[last]

    @property
    def widths(self) -> list[int]:
        """The rows' width at the start and after each round of `select`."""
        widths = [self.width]
        while widths[-1] > max(RANKED, self.k):
            widths.append(chunks(widths[-1], self.k) * self.k)
        return widths

    @property
    def words(self) -> int:
        """Number of 32-bit words that hold a box's overlaps."""
        return -(-self.k // 32)

    @property
    def select(self) -> KernelSpec:
        """The kernel of one round of top-k."""
        pointers = [(name, "*i32") for name in ("keys", "indices", "best_keys", "best_indices")]
        signature = (*pointers, ("width", "i32"), ("k", "i32"))
        return KernelSpec(KERNELS, "select", signature, (("CHUNK", chunk(self.k)),), num_warps=chunk_warps(self.k))

    @property
    def overlaps(self) -> KernelSpec:
        """The kernel that compares the boxes of a row in pairs."""
        signature = (("boxes", "*fp32"), ("indices", "*i32"), ("better", "*i32"), ("k", "i32"), ("threshold", "fp32"))
        return KernelSpec(KERNELS, "overlaps", signature, (("GROUPS", self.groups), ("BLOCK", OVERLAPS_BLOCK)))

    @property
    def suppress(self) -> KernelSpec:
        """The kernel that keeps or suppresses the boxes of a row, best first."""
        signature = (*((name, "*i32") for name in ("keys", "better", "kept_keys", "kept_counts")), ("k", "i32"), ("words", "i32"))
        words = power_of_two(self.words)
        return KernelSpec(KERNELS, "suppress", signature, (("WORDS", words),), num_warps=max(1, words // 32))

    def kernels(self) -> list[KernelSpec]:
        """The kernels that `top_k` and `nms` may launch; they do not depend on `rows` and `width`."""
        return [self.select, self.overlaps, self.suppress]

    def top_k(self) -> list[Launch]:
        """From `entries` to `ranked`: rounds in which each program keeps the k best of its chunk."""
        launches = []
        for index, width in enumerate(self.widths[:-1]):
            parts = [self.part(f"{name} {at}") for at in (index, index + 1) for name in ("keys", "indices")]
            launches.append(Launch(self.select, (chunks(width, self.k), self.rows, 1), (*parts, width, self.k)))
        return launches

    def nms(self, threshold: float) -> list[Launch]:
        """From `boxes`, `best_keys` and `best_indices` to `kept_keys` and `kept_counts`; torchvision's NMS at this IoU threshold."""
        boxes, indices, better = (self.part(name) for name in ("boxes", "best_indices", "better"))
        grid = (-(-self.k // OVERLAPS_BLOCK), self.words, self.rows)
        kept = (self.part("best_keys"), better, self.part("kept_keys"), self.part("kept_counts"))
        return [
            Launch(self.overlaps, grid, (boxes, indices, better, self.k, threshold)),
            Launch(self.suppress, (self.rows, 1, 1), (*kept, self.k, self.words)),
        ]


def chunk(k: int) -> int:
    """Candidates of one program, which keeps the `k` best."""
    return min(power_of_two(16 * k), LARGEST_CHUNK)


def chunk_warps(k: int) -> int:
    """Warps of a program that selects from a `chunk(k)`."""
    return max(1, chunk(k) // 512)


def chunks(width: int, k: int) -> int:
    """Programs for a row of `width` candidates."""
    return -(-width // chunk(k))
