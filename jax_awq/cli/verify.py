"""`python -m jax_awq verify`: is the arithmetic right, and what does each scheme cost."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jax_awq import models
from jax_awq.bench import report
from jax_awq.checkpoint import load_hf
from jax_awq.verify import model as in_model
from jax_awq.verify.round_trip import round_trips
from jax_awq.verify.schemes import SCHEMES, Row, exceeded, summary
from jax_awq.verify.synthetic import synthetic_rows, synthetic_weights
from jax_awq.weights import WEIGHTS

_NARROWEST = 80  # columns; with less rich would cut digits off
_BOUNDS = "\n\n".join(
    f"{s.name}: error {s.error:g}, perplexity {s.perplexity:g} x" for s in SCHEMES
)
HELP = f"""Check packing, and measure what rounding activations costs.

Codes, layouts and dequantization go there and back, bit for bit. Then every linear is multiplied
as each scheme has it, and compared with float32 activations times the dequantized weight: of a
checkpoint, on the activations that the model itself makes, with its perplexity; without one, on
synthetic data.

Exit code 1 where something is not the same, or beyond its bound. Bounds are the relative error of
the linears' outputs on average, and the perplexity over that of float32:

{_BOUNDS}
"""


@dataclasses.dataclass
class _Result:
    """What was found; `rows` has every linear under every scheme."""

    round_trips: list[Row]
    rows: list[Row] = dataclasses.field(default_factory=list)
    perplexities: dict[str, float] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        broken = [r for r in self.round_trips if not r["same"]]
        return [f"layout {r['layout']}: {r['what']} is not the same" for r in broken] + exceeded(
            summary(self.rows, self.perplexities), self.perplexities.get("float32")
        )


def verify(
    awq_model_path: Annotated[
        Path | None, typer.Option(help="Hugging Face folder of an AWQ checkpoint.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="What the model reads: .npy of ids (B, T), .npz with valid_ids, or text for its "
            "tokenizer. By default its expected_model.npz, else random ids without a perplexity. A "
            "quarter of the rows calibrates the static scales, the others are measured."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all of it to this file.")
    ] = None,
) -> None:
    console, progress = Console(), Progress(console=Console(stderr=True), transient=True)
    try:
        if json_file is not None:
            try:
                report.check_writable(json_file)
            except OSError as error:
                raise OSError(f"verify: --json {error}") from error
        with progress:
            result = _run(awq_model_path, tokens, progress)
        if json_file is not None:
            _write(json_file, result)
    except (OSError, ValueError, ImportError) as error:
        progress.console.print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(1) from error
    console.width = max(console.width, _NARROWEST)
    for table in _tables(result):
        console.print(table)
    problems = result.problems
    for told in _told(result, problems):
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)


def _run(path: Path | None, tokens: Path | None, progress: Progress) -> _Result:
    if path is not None and not path.is_dir():
        raise FileNotFoundError(f"verify: {path} is no folder")
    task = progress.add_task("round trip", total=9)
    result = _Result([])
    for layout, what, same in round_trips():
        result.round_trips.append({"layout": layout, "what": what, "same": same})
        progress.advance(task)
    if path is None:
        if tokens is not None:
            raise ValueError("verify: --tokens needs --awq-model-path")
        _synthetic(result, synthetic_weights(), progress)
        return result
    result.about["checkpoint"] = str(path)
    try:
        model = models.load(path, dtype="float32")
    except ValueError as error:
        # What is no decoder that runs here may still be a checkpoint.
        weights = {k: w for k, w in load_hf(path).items() if isinstance(w, WEIGHTS)}
        if not weights:
            raise
        result.about["without_model"] = str(error)
        _synthetic(result, weights, progress)
        return result
    _of_model(result, model, path, tokens, progress)
    return result


def _synthetic(result: _Result, weights: dict[str, Any], progress: Progress) -> None:
    task = progress.add_task("synthetic activations", total=len(weights))
    result.about |= {"activations": "synthetic", "dtype": "float16"}
    result.rows = synthetic_rows(weights, "float16", lambda: progress.advance(task))


def _of_model(
    result: _Result, model: models.Model, path: Path, tokens: Path | None, progress: Progress
) -> None:
    config = models.read_decoder_config(path)
    dtype = "bfloat16" if config.dtype == "bfloat16" else "float16"
    text = in_model.read_tokens(tokens, path, config)
    measured = text.measured

    def bar(name: str, total: int) -> Any:
        task = progress.add_task(name, total=total)
        return lambda: progress.advance(task)

    inputs = in_model.Inputs(model)
    seen = in_model.calibrate(inputs, text.calibration, bar("calibration", len(text.calibration)))
    if not seen:
        raise ValueError(f"verify: {path} has no packed linear")
    result.rows = in_model.layer_rows(inputs, measured, seen, dtype, bar("linears", len(measured)))
    result.about |= {
        "activations": "of the model",
        "dtype": dtype,
        "calibration_tokens": int(text.calibration.size),
        "tokens": int(measured.size),
    }
    if not text.meaningful:
        return
    advance = bar("perplexity", len(measured) * (1 + len(SCHEMES)))
    run = in_model.perplexity
    result.perplexities["float32"] = run(model.params, model.config, measured, advance)
    del model, inputs
    half = models.load(path, dtype=dtype, attention="xla")
    for scheme in SCHEMES:
        params = in_model.with_scheme(half.params, scheme, seen)
        result.perplexities[scheme.name] = run(params, half.config, measured, advance)


def _write(file: Path, result: _Result) -> None:
    top = report.environment() | {
        "platform": jax.devices()[0].platform,
        **result.about,
        "round_trips": result.round_trips,
        "perplexity": result.perplexities.get("float32"),
        "summary": summary(result.rows, result.perplexities),
        "bounds": [
            {"scheme": s.name, "mean_error": s.error, "perplexity_ratio": s.perplexity}
            for s in SCHEMES
        ],
        "exceeded": result.problems,
    }
    report.write(file, top, result.rows)


def _tables(result: _Result) -> Iterable[Table]:
    names = (scheme.name.replace(" ", "\n") for scheme in SCHEMES)
    table = _table("relative error of outputs", ["linear", *names], left=("linear",))
    by_layer: dict[str, list[str]] = {}
    for row in result.rows:
        by_layer.setdefault(row["layer"], []).append(f"{row['error']:.2g}")
    for layer, cells in by_layer.items():
        table.add_row(layer, *cells)
    yield table
    float32 = result.perplexities.get("float32")
    columns = ["scheme", "mean\nerror", "bound", "worst", "of linear", "largest"]
    if float32 is not None:
        columns += ["perplexity", "bound"]
    table = _table("summary", columns, left=("scheme", "of linear"))
    if float32 is not None:
        table.add_row("float32", "0", "", "0", "", "0", f"{float32:.4g}")
    for scheme, row in zip(SCHEMES, summary(result.rows, result.perplexities), strict=True):
        cells = [f"{row['mean_error']:.3g}", f"{scheme.error:g}", f"{row['worst_error']:.3g}"]
        cells += [row["worst_layer"], f"{row['max']:.2g}"]
        if float32 is not None:
            cells += [f"{row['perplexity']:.4g}", f"{scheme.perplexity * float32:.4g}"]
        table.add_row(scheme.name, *cells)
    yield table


def _table(title: str, columns: Iterable[str], left: tuple[str, ...]) -> Table:
    table = Table(title=title, box=None)
    for name in columns:
        justify: Any = "left" if name in left else "right"
        table.add_column(name, justify=justify, overflow="fold", no_wrap="linear" not in name)
    return table


def _told(result: _Result, problems: list[str]) -> Iterable[str]:
    same = sum(row["same"] for row in result.round_trips)
    yield f"{same} of {len(result.round_trips)} round trips are the same, bit for bit"
    if "without_model" in result.about:
        yield f"the model cannot run, so activations are synthetic: {result.about['without_model']}"
    linears = len({row["layer"] for row in result.rows})
    yield (
        f"{linears} linears, {result.about['dtype']} activations {result.about['activations']}, "
        f"on {jax.devices()[0].device_kind}"
    )
    if "tokens" in result.about and not result.perplexities:
        yield "the tokens are random, so there is no perplexity: give --tokens"
    for problem in problems:
        yield f"problem: {problem}"
    if not problems:
        yield "no problems"
