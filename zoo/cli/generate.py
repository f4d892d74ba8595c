"""``zoo generate``"""

from pathlib import Path
from typing import Annotated, Any

import typer


def generate(
    model: Annotated[str, typer.Argument(help="A model with weights, model.tag, a run folder, or hf-hub:owner/name.")],
    prompt: Annotated[str, typer.Option(help="What to go on with; empty: the model begins.")] = "",
    batch: Annotated[
        Path | None,
        typer.Option(help='Go on with many at once: a prompt a line, or JSONL with "prompt". Depth-wise batching.'),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="End after so many tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among so many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed writes the same text; prompt i of a batch has seed + i.")
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="In place of the one that the weights name.")] = "",
    device: Annotated[str | None, typer.Option(help="For example cpu or cuda.")] = None,
    show_depth: Annotated[
        bool, typer.Option("--show-depth", help="Colour each token by the recursions that it took.")
    ] = False,
    plot_depth: Annotated[
        Path | None, typer.Option(help="Draw recursions by position and kind of token: PNG, SVG or PDF.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let a language model go on with a text, or with many."""
    from zoo.analysis.depth import check_picture, coloured, legend, pieces_of, plot_depths
    from zoo.cli._output import print_json
    from zoo.errors import ConfigError
    from zoo.generation import load_writer, read_prompts

    together = batch is not None or show_depth or plot_depth is not None
    if together and stream:
        raise ConfigError("--stream prints one text as it comes; expected it without --batch and depths.")
    if batch is not None and prompt:
        raise ConfigError("Expected either --prompt or --batch, and not both.")
    if plot_depth is not None:
        check_picture(plot_depth)
    prompts = [prompt] if batch is None else read_prompts(batch)
    writer = load_writer(model, tokenizer=tokenizer, device=device)
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    if not together:
        live = stream and not as_json
        if live:
            print(prompt, end="", flush=True)
        on_text = (lambda piece: print(piece, end="", flush=True)) if live else None
        text = writer.write(prompt, **sampling, on_text=on_text)
        if as_json:
            print_json({"model": model, "prompt": prompt, "text": text})
        else:
            print("" if live else prompt + text)
        return

    texts = writer.write_all(prompts, **sampling)
    depths = show_depth or plot_depth is not None
    pieces = [pieces_of(each.tokens, writer.tokenizer) if depths else [] for each in texts]
    recursions = writer.model.config.num_recursions
    if plot_depth is not None:
        plot_depths([(its, each.depths) for its, each in zip(pieces, texts, strict=True)], recursions, plot_depth)
    if as_json:
        found: list[dict[str, Any]] = [{"model": model, "prompt": each.prompt, "text": each.text} for each in texts]
        for values, each, its in zip(found, texts, pieces, strict=True):
            if depths:
                values |= {"pieces": its, "depths": each.depths}
        print_json(found if batch is not None else found[0])
        return
    for number, (each, its) in enumerate(zip(texts, pieces, strict=True)):
        if number:
            print("---")
        print(coloured(its, each.depths) if show_depth else each.prompt + each.text)
    if show_depth:
        print(legend([depth for each in texts for depth in each.depths], recursions))
