"""Stage 4, calibrate: read the texts of a build and cut them into rows of token ids.

Rows are drawn by a seed; evaluation rows come from other text than calibration rows. Only what is drawn is tokenized.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from packager.errors import CalibrationError
from packager.inputs.base_model import SourceModel
from packager.inputs.branch_tokenizer import BranchTokenizer, branch_tokenizer
from packager.inputs.chat import (
    AskedQuestion,
    Question,
    card_prompt,
    check_prompt_template,
    encode_texts,
    prompt_chat,
    question_of,
    read_questions,
    render_messages,
)
from packager.inputs.dataset_files import download_split
from packager.inputs.limits import Chat, ModelProcess, TextGroup
from packager.inputs.overlap import check_overlap
from packager.inputs.rows import TokenRows, draw_rows, token_rows
from packager.inputs.samples import WantedRows
from packager.inputs.text_files import SUFFIXES, TextFile, json_lines, kind_of
from packager.inputs.tokenizer import check_vocabulary
from packager.model.branch_config import BranchFile
from packager.recipe.file import RecipeFile
from packager.recipe.text_models import Evaluation, TextSource


@dataclass(frozen=True, kw_only=True)
class TextSets:
    """All texts of a build as token ids.

    Attributes:
        calibration: rows that the quantizer sees.
        evaluation: held-out rows.
        questions: with their answers.
        prompts: token ids after each of which loaders generate.
        tokenizer_files: of a branch, in the place of the base model's, see `branch_tokenizer`.
    """

    calibration: TokenRows
    evaluation: TokenRows
    questions: tuple[Question, ...]
    prompts: tuple[tuple[int, ...], ...]
    tokenizer_files: Mapping[str, BranchFile] = field(default_factory=dict)


def prepare(recipe_file: RecipeFile, source: SourceModel) -> TextSets:
    """Read and tokenize calibration text, evaluation text, questions and prompts, each once.

    Raises:
        CalibrationError: a text cannot be read, is too short or overlaps the other; the tokenizer or the prompt
            template does not fit the model.
        SourceError: the Hub refused a dataset.
    """
    with ModelProcess() as process:
        return _prepare(recipe_file, source, process)


def _prepare(recipe_file: RecipeFile, source: SourceModel, process: ModelProcess) -> TextSets:
    recipe = recipe_file.recipe
    loaded = load_tokenizer(source, process)
    tokenizer = loaded.opened
    check_vocabulary(tokenizer, source.architecture.vocab_size, str(source.folder))
    asked = _questions(recipe.evaluation, recipe_file)
    check_prompt_template(recipe_file, card_prompt(recipe, tokenizer, process))
    chats = [chat for question in asked for chat in question.chats]
    chats += [prompt_chat(prompt) for prompt in recipe.loaders.prompts]
    rendered = render_messages(tokenizer, chats, process) if chats else []

    def render(conversations: Sequence[Chat]) -> list[str]:
        return render_messages(tokenizer, conversations, process)

    *calibration, evaluation = draw_rows(tokenizer, wanted_rows(recipe_file), render, process)
    check_overlap(  # a stretch of a text is no document: joined, their lines are compared
        ["\n".join(text for drawn in calibration for text in drawn.sample.texts)],
        ["\n".join(evaluation.sample.texts)],
        where=recipe.evaluation.name,
    )
    (rendered_ids,) = encode_texts(tokenizer, [TextGroup(texts=rendered, add_special_tokens=False)], process)
    pairs = zip(asked, rendered_ids[: 2 * len(asked) : 2], rendered_ids[1 : 2 * len(asked) : 2], strict=True)
    return TextSets(
        calibration=token_rows(calibration),
        evaluation=token_rows([evaluation]),
        questions=tuple(question_of(*pair) for pair in pairs),
        prompts=tuple(tuple(ids) for ids in rendered_ids[2 * len(asked) :]),
        tokenizer_files=loaded.files,
    )


def wanted_rows(recipe_file: RecipeFile) -> tuple[WantedRows, ...]:
    """Return the rows that a recipe wants: of each calibration text, and of the evaluation text as the last one.

    The files of datasets are downloaded.

    Raises:
        CalibrationError: a dataset has no such split.
        SourceError: the Hub refused a dataset.
    """
    calibration, evaluation = recipe_file.recipe.calibration, recipe_file.recipe.evaluation
    wanted = [
        _wanted(text, recipe_file, num_rows=rows, seq_len=calibration.seq_len, seed=calibration.seed)
        for text, rows in zip(calibration.texts, calibration.rows_of_texts, strict=True)
    ]
    last = _wanted(
        evaluation, recipe_file, num_rows=evaluation.num_rows, seq_len=evaluation.seq_len, seed=evaluation.seed
    )
    return (*wanted, last)


def _wanted(text: TextSource, recipe_file: RecipeFile, *, num_rows: int, seq_len: int, seed: int) -> WantedRows:
    if text.path is not None:
        files: tuple[TextFile, ...] = (TextFile(path=recipe_file.resolve(text.path), shown=text.path),)
        if not kind_of(text.path):
            raise CalibrationError(
                "the text is of a format that is not read", where=text.path, why=f"read are {', '.join(SUFFIXES)}"
            )
        license_name = None
    else:
        split = download_split(str(text.dataset), str(text.revision), text.config, str(text.split))
        files, license_name = split.files, split.license
    return WantedRows(
        text=text, files=files, license=license_name, num_rows=num_rows, seq_len=seq_len, seed=seed
    )  # fmt: skip


def load_tokenizer(source: SourceModel, process: ModelProcess) -> BranchTokenizer:
    """Return the tokenizer of a base model's branches.

    It is made of copies of the files that a branch gets, so that it is the branch's and reads nothing else.

    Args:
        source: the base model.
        process: reads the tokenizer before this process does.

    Raises:
        CalibrationError: see `branch_tokenizer`.
        SourceError: one of its files was replaced since it was checked.
    """
    files = {name: source.copied(name) for name in source.files.copied}
    return branch_tokenizer(files, source.config, str(source.folder), process)


def _questions(evaluation: Evaluation, recipe_file: RecipeFile) -> tuple[AskedQuestion, ...]:
    if evaluation.questions is None:
        return ()
    path = recipe_file.resolve(evaluation.questions)
    return read_questions(path, json_lines(TextFile(path=path, shown=str(path))))
