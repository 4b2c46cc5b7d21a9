"""Shows what was measured of whole models: tables on the terminal, and in the documentation."""

from collections.abc import Iterator

from rich.console import Console

from parts import PARTS
from report import make_table, place

Table = tuple[list[str], list[list[str]]]  # columns, rows
_LEFT = 3  # columns with words


def show(console: Console, result: dict) -> None:
    titles = {
        "models": "Whole models: tokens per second",
        "turns": "Decode in turns: tokens per second, by medians and by quickest calls",
        "memory": "Peak memory, GB",
        "limits": "Share of the machine's rates reached",
        "parts": "Where the time of the patched model goes",
        "layers": "One layer of the patched model, with either attention",
        "graphs": "Making the graph of a layer in decode, without evaluating it",
        "scaling": "Scaled time and memory of a small stock model, as parts of those of the whole",
    }
    show_tables(console, titles, _tables(result))
    console.print("~ scaled from one layer and the head", highlight=False)
    console.print(about(result), highlight=False)


def show_tables(
    console: Console, titles: dict[str, str], tables: dict[str, Table], words: int = _LEFT
) -> None:
    for name, (columns, rows) in tables.items():
        table = make_table(titles[name])
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i < words else "right")
        for row in rows:
            table.add_row(*row)
        if rows:
            console.print(table)


def about(result: dict) -> str:
    """The machine and its rates."""
    return f"{place(result['machine'])} {_rates(result)}"


def markdown(result: dict) -> dict[str, str]:
    """Each table by the name of its place in the document."""
    texts = {name: markdown_table(*table) for name, table in _tables(result).items()}
    return {**texts, "models": f"{about(result)}\n\n{texts['models']}"}


def markdown_table(columns: list[str], rows: list[list[str]], words: int = _LEFT) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * words}{'--:|' * (len(columns) - words)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _tables(result: dict) -> dict[str, Table]:
    records = result["records"]
    rivals = list(dict.fromkeys(who for r in records for who in r["seconds"]))
    rivals = [who for who in rivals if who not in ("stock", "patched")]
    first = ["model", "weights", ""]
    return {
        "models": (
            [*first, "stock", "patched", "ratio", *rivals],
            [[*_what(r), *_speeds(r, rivals)] for r in records],
        ),
        "turns": (
            ["model", "weights", "beside", "calls", *2 * ("patched", "beside", "ratio")],
            [row for r in records if r["work"] == "decode" for row in _turns(r)],
        ),
        "memory": (
            [*first, "stock", "patched", "ratio"],
            [[*_what(r), *_memory(r["memory"], r["scaled"])] for r in records],
        ),
        "limits": (
            [*first, "limit", "patched", *rivals],
            [[*_what(r), *_shares(r, rivals)] for r in records],
        ),
        "parts": (
            [*first, *PARTS],
            [[*_what(r), *(f"{r['parts'][part]:.0%}" for part in PARTS)] for r in records if r["parts"]],
        ),
        "layers": (
            [*first, "ours", "MLX's", "ratio"],
            [[*_what(r), *_layer(r["layer_s"])] for r in records],
        ),
        "graphs": (
            ["model", "", "", "stock", "patched", "ratio"],
            [
                [name, "", "", *(f"{us[who]:.0f} µs" for who in us), f"{us['patched'] / us['stock']:.2f}"]
                for name, us in result["graph_us"].items()
            ],
        ),
        "scaling": (
            ["weights", "", "timed", "seconds", "memory"],
            [list(_scaling_row(check)) for check in result["scaling"]],
        ),
    }


def _what(record: dict) -> list[str]:
    tokens = f" of {record['tokens']}" if record["tokens"] > 1 else ""
    return [record["model"], record["weights"], record["work"] + tokens]


def _speeds(record: dict, rivals: list[str]) -> Iterator[str]:
    speeds = record["tokens_per_s"]
    for who in ("stock", "patched"):
        yield "~" * (who in record["scaled"]) + digits(speeds[who])
    yield digits(record["ratio"])
    for who in rivals:
        yield digits(speeds[who]) if who in speeds else ""


def _turns(record: dict) -> Iterator[list[str]]:
    """Of every rival that took as many turns as the patched model."""
    calls = record["calls"]
    for who in calls:
        if who in ("stock", "patched") or calls[who] != calls.get("patched"):
            continue
        row = [record["model"], record["weights"], who, str(calls[who])]
        for seconds in (record["median_s"], record["seconds"]):
            ours, theirs = (record["tokens"] / seconds[name] for name in ("patched", who))
            row += [digits(ours), digits(theirs), f"{ours / theirs:.2f}"]
        yield row


def _memory(memory: dict, scaled: dict) -> Iterator[str]:
    for who in ("stock", "patched"):
        yield f"{'~' * (who in scaled)}{memory[who] / 1e9:.2f}" if memory[who] else ""
    both = all(memory[who] for who in ("stock", "patched"))
    yield f"{memory['patched'] / memory['stock']:.2f}" if both else ""


def _shares(record: dict, rivals: list[str]) -> Iterator[str]:
    yield f"{record['peak']['rate']:.0f} {record['peak']['unit']}"
    for who in ("patched", *rivals):
        share = record["share_of_peak"].get(who)
        yield f"{share:.0%}" if share is not None else ""


def _layer(seconds: dict[str, float]) -> Iterator[str]:
    yield from (f"{1e3 * seconds[whose]:.3g} ms" for whose in ("ours", "MLX's"))
    yield digits(seconds["MLX's"] / seconds["ours"])


def _scaling_row(check: dict) -> Iterator[str]:
    yield from (check["weights"], check["work"])
    tokens = check["tokens"]
    yield f"layers with {tokens['layers']} tokens, head with {tokens['head']}"
    yield f"{check['seconds']:.2f}"
    yield f"{check['memory']:.2f}" if check["memory"] else ""


def digits(value: float) -> str:
    """Three of them, but no fewer than a whole number has."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _rates(result: dict) -> str:
    rates = dict(result["rates"])
    read = rates.pop("read")
    flops = ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in rates.items())
    return f"Reading memory reached {read / 1e9:.0f} GB/s, and a matrix product {flops}."


# The memory of training


def show_memory(console: Console, result: dict) -> None:
    columns, rows = _memory_table(result)
    table = make_table(f"Memory of a LoRA step, {result['model']}, {result['weights']}")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown_of_memory(result: dict) -> str:
    columns, rows = _memory_table(result)
    return f"{result['model']}, {result['weights']}.\n\n" + markdown_table(columns, rows, words=1)


def _memory_table(result: dict) -> Table:
    def row(name: str, values: dict, unit: float, suffix: str) -> list[str]:
        stock, patched = values["stock"], values["patched"]
        return [name, *(f"{v / unit:.3g} {suffix}" for v in (stock, patched)), f"{patched / stock:.2f}"]

    rows = [row("kept by an MLP, per token and layer", result["kept_bytes"], 1e3, "kB")]
    for tokens, peaks in result["peak_bytes"].items():
        rows.append(row(f"peak of one layer, {tokens} tokens", peaks, 1e6, "MB"))
    return ["", "stock", "patched", "ratio"], rows
