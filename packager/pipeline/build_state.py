"""A build in progress: which stages are done with the present inputs, and the values that several stages share.

Each stage leaves its result in `dist/` with a digest of everything that went into it. A stage whose digest is
unchanged is not run again; that decision needs neither torch nor a network.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from packager.inputs.source_files import list_source_files
from packager.inputs.weights_digests import long_to_hash
from packager.model.devices import choose_device, device_type, same_devices
from packager.pipeline.branch_files import check_small_files
from packager.pipeline.build_options import Options
from packager.pipeline.pack import is_packed
from packager.pipeline.plan import chosen_variants, make_plan
from packager.pipeline.stage_keys import StageName, base_digests, input_digests, stage_keys
from packager.pipeline.variant_plan import VariantPlan
from packager.pipeline.workspace import Workspace, check_folder
from packager.prove.environments import RuntimeContext, waits_for_request
from packager.prove.other_loader import loader_spec
from packager.receipt import PROVENANCE, README, Receipt
from packager.recipe.file import RecipeFile
from packager.system.host_memory import peak_memory_bytes
from packager.system.parallel import in_parallel
from packager.system.terminal import Terminal
from packager.system.text import format_bytes

if TYPE_CHECKING:
    import torch

    from packager.inputs.base_model import SourceModel
    from packager.inputs.texts import TextSets
    from packager.quantize.block_store import BlockCopies


class BuildState:
    """A build in progress: what is done, what is missing, and the values that several stages share.

    Args:
        recipe_file: what is built.
        options: where and how.
        terminal: gets all messages.
        only: the branches that are worked on; none are all.

    Attributes:
        plan: of all branches.
        wanted: the variants that are worked on.
        block_copies: returns, for a branch, where copies of its finished blocks are kept; None for nowhere.
    """

    def __init__(
        self, recipe_file: RecipeFile, options: Options, terminal: Terminal, only: Collection[str] = ()
    ) -> None:
        self.recipe_file = recipe_file
        self.recipe = recipe_file.recipe
        self.options = options
        self.terminal = terminal
        self.plan = make_plan(recipe_file)
        self.wanted = chosen_variants(self.plan.variants, only, str(recipe_file.path))
        self.workspace = Workspace(dist=options.dist, repository=self.recipe.repository.id)
        self.receipts: dict[str, Receipt] = {}
        self.block_copies: Callable[[str], BlockCopies] | None = None
        self._source: SourceModel | None = None
        self._texts: TextSets | None = None
        self._device: torch.device | None = None
        # All but the base model: a text that is edited while blocks are computed is not the one that they are of.
        self._inputs = input_digests(recipe_file, {})
        if not self._hashed_later():
            self.keys  # noqa: B018 - errors of the base model's files are raised now

    @cached_property
    def keys(self) -> dict[str, dict[str, str]]:
        """For each branch, the keys of its stages, see `stage_keys`.

        A local base model is hashed, unless it is open: then it is the one that was opened.

        Raises:
            SourceError: its weights were replaced since it was opened.
        """
        if self._source is not None and self.recipe.base_model.path is not None:
            files, found = self._source.files, self._source.record.files
            names = {path.relative_to(files.folder).as_posix(): path.name for path in replace(files, licenses=()).paths}
            base = {short: found[name].sha256 for name, short in names.items()}
        else:
            with self.terminal.busy("hashing the base model"):
                base = base_digests(self.recipe_file)
        inputs = replace(self._inputs, base=base)
        return {each.variant.branch: stage_keys(self.recipe_file, each, inputs) for each in self.plan.variants}

    def _hashed_later(self) -> bool:
        """Return whether the keys wait until something needs them: hashing takes long, and a build can begin without.

        Raises:
            SourceError: a file of a local base model cannot be used.
        """
        base = self.recipe.base_model
        if base.path is None:
            return False  # nothing is hashed
        paths = list_source_files(self.recipe_file.base_folder(base.path)).paths
        return long_to_hash(sum(path.stat().st_size for path in paths))

    def missing(self, stage: StageName, *, anywhere: bool = False) -> tuple[VariantPlan, ...]:
        """Return the wanted variants, or all, for which a stage has not been done with the present inputs.

        A stage that the recipe does not ask for is missing nowhere: the tasks of a recipe without any.
        """
        return tuple(
            variant_plan
            for variant_plan in (self.plan.variants if anywhere else self.wanted)
            if (key := self.keys[variant_plan.variant.branch].get(stage)) is not None
            and (
                (receipt := self.receipts.get(variant_plan.variant.branch)) is None or receipt.stages.get(stage) != key
            )
        )

    def loaders_to_run(self) -> tuple[str, ...]:
        """Return the recipe's loaders that have no result for some variant and that this machine can run.

        "not run" is the result of one machine, or of a failure that may have passed since, such as a package index that
        could not be reached. So a loader that did not run is run by the next build on a machine that can run it, and
        one whose environment is made on request by the next build after that.
        """
        if self.missing("verify"):
            return self.recipe.loaders.names
        results = [
            {record.loader for record in receipt.provenance.loaders if record.status != "not run"}
            for receipt in self.ordered_receipts()
        ]
        left = [name for name in self.recipe.loaders.names if any(name not in found for found in results)]
        required, options = self.recipe.loaders.required, self.options
        return tuple(
            name
            for name in left
            if not loader_spec(name).machine_problem(device_type(options.device))
            and not waits_for_request(loader_spec(name), required, options.cache)
        )

    def read_receipts(self) -> None:
        """Read the receipts of variants that earlier runs finished.

        Raises:
            StateError: a finished folder differs from its receipt.
        """
        branches = [variant_plan.variant.branch for variant_plan in self.plan.variants]
        size_bytes = sum(_bytes_in(self.workspace.folder(branch)) for branch in branches)
        if long_to_hash(size_bytes):
            self.terminal.log(f"comparing {format_bytes(size_bytes)} of finished files with their records")
        with self.terminal.busy("comparing finished files with their records"):
            found = in_parallel(self.read_receipt, branches)
        self.receipts |= {receipt.provenance.branch: receipt for receipt in found if receipt is not None}

    def read_receipt(self, branch: str) -> Receipt | None:
        """Return the receipt of a variant that is built with the present inputs, or None.

        Raises:
            StateError: its folder differs from the receipt.
        """
        folder, receipt = self.workspace.folder(branch), self.workspace.read_receipt(branch)
        if receipt is None or receipt.stages.get("weights") != self.keys[branch]["weights"] or not folder.exists():
            return None
        check_folder(folder, receipt, ignore=self.card_files(receipt))
        return receipt

    def runtime_context(self, scratch: Path) -> RuntimeContext:
        """Return the context of runtimes in their own environments; `scratch` is the folder of their files."""
        options = self.options
        return RuntimeContext(cache=options.cache, scratch=scratch, environ=options.environ, log=self.terminal.log)

    def card_files(self, receipt: Receipt) -> frozenset[str]:
        """Return the names of the files that the card stage writes to a variant's folder, or a killed run wrote."""
        announced = self.workspace.announced(receipt.provenance.branch)
        known = (*receipt.provenance.files, *(announced.provenance.files if announced else ()))
        return frozenset((README, PROVENANCE, *(name for name in known if not is_packed(name))))

    def ordered_receipts(self) -> tuple[Receipt, ...]:
        """Return the receipts of the wanted variants in the recipe's order."""
        return tuple(self.receipts[variant_plan.variant.branch] for variant_plan in self.wanted)

    def keep(self, receipt: Receipt) -> None:
        """Make a receipt the present one, and write it unless the same receipt is written already."""
        branch = receipt.provenance.branch
        if receipt == self.receipts.get(branch) and not self.workspace.unfinished_path(branch).exists():
            return
        self.receipts[branch] = receipt
        self.workspace.write_receipt(receipt)

    def update_receipt(
        self, branch: str, stage: StageName, seconds: float, fields: Mapping[str, object], **beside: object
    ) -> None:
        """Write a stage's results into a variant's receipt.

        Args:
            branch: of the variant.
            stage: that is done with the present inputs.
            seconds: how long it took.
            fields: of the receipt's provenance.
            beside: fields of the receipt beside its provenance.
        """
        receipt = self.receipts[branch]
        changes = {
            "provenance": receipt.provenance.model_copy(update=fields),
            "stages": {**receipt.stages, stage: self.keys[branch][stage]},
            "seconds": {**receipt.seconds, stage: round(seconds, 3)},
            "peak_memory_bytes": max(receipt.peak_memory_bytes, peak_memory_bytes()),
            **beside,
        }
        self.keep(receipt.model_copy(update=changes))

    @property
    def source(self) -> "SourceModel":
        """The base model, opened when first needed."""
        from packager.inputs.base_model import open_source

        if self._source is None:
            with self.terminal.stage("source"):
                self._source = open_source(self.recipe_file, self.terminal.log, self._check_small_files)
        return self._source

    def _check_small_files(self, folder: Path) -> None:
        self._log_changes(check_small_files(folder, self.recipe, self.plan.architecture))

    def _log_changes(self, changes: Iterable[str]) -> None:
        for change in changes:
            self.terminal.log(f"not as the base model has it: {change}")

    @property
    def texts(self) -> "TextSets":
        """Calibration and evaluation tokens, read when first needed: those that an earlier run kept, or drawn now."""
        from packager.inputs.kept_texts import prepare_once

        if self._texts is None:
            source = self.source
            with self.terminal.stage("calibrate"):
                self._texts = prepare_once(self.recipe_file, source, self.workspace.rows, self.terminal.log)
            for file in self._texts.tokenizer_files.values():
                self._log_changes(file.changes)
        return self._texts

    @property
    def device(self) -> "torch.device":
        """The device to compute on."""
        if self._device is None:
            self._device = choose_device(self.options.device)
        return self._device

    @property
    def devices(self) -> "tuple[torch.device, ...]":
        """The devices to quantize on: the device and every other GPU of the same kind."""
        return same_devices(self.device)


def _bytes_in(folder: Path) -> int:
    """Return the approximate size of a folder's files: other processes may write there."""
    size_bytes = 0
    with suppress(OSError):
        for path in folder.rglob("*"):
            size_bytes += path.lstat().st_size
    return size_bytes
