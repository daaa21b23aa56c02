"""A loader of one's own: Acme's runtime for Llama models, which computes in plain torch on the CPU."""

from pathlib import Path

from packager.model.architecture import Architecture
from packager.model.rules import RulesOf, bits_check, same_bits, take_bits, types_check
from packager.prove.other_loader import OtherLoader
from packager.variant import Variant

HERE = Path(__file__).parent
# Each rule has the file and the day on which it was read; `packager plan` shows what it says.
ACME = RulesOf(project="Acme", version="1.0", read="2026-11-30")


def plain_positions(_: Variant, architecture: Architecture) -> str:
    """Refuse models whose rotary embedding is scaled."""
    return "knows no scaled rotary embedding" if architecture.scaled_rope else ""


def plain_linears(_: Variant, architecture: Architecture) -> str:
    """Refuse models with biases, or with linears that are not quantized."""
    if any(linear.bias for linear in architecture.example_linears):
        return "knows no bias"
    return "reads quantized linears only" if architecture.left else ""


def acme() -> OtherLoader:
    """Describe the runtime."""
    return OtherLoader(
        title="Acme",
        version="1.0",
        script=HERE / "acme_probe.py",
        lock=HERE / "acme.txt",
        devices=frozenset({"cpu"}),
        rules=(
            ACME.refuses(bits_check(2, 4, 8), "acme_probe, unpack", take_bits((2, 4, 8))),
            ACME.refuses(same_bits, "acme_probe, weight", "take a branch whose linears all have the same bits"),
            ACME.refuses(types_check(("llama",), "knows"), "acme_probe, Llama", "take another runtime"),
            ACME.refuses(plain_positions, "acme_probe, rotate", "take another runtime"),
            ACME.refuses(plain_linears, "acme_probe, Llama", "take another runtime"),
        ),
    )
