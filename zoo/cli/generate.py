"""``zoo generate``"""

from typing import Annotated

import typer


def generate(
    model: Annotated[str, typer.Argument(help="A model with weights, model.tag, a run folder, or hf-hub:owner/name.")],
    prompt: Annotated[str, typer.Option(help="What to go on with; empty: the model begins.")] = "",
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="End after so many tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among so many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same text.")] = None,
    tokenizer: Annotated[str, typer.Option(help="In place of the one that the weights name.")] = "",
    device: Annotated[str | None, typer.Option(help="For example cpu or cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let a language model go on with a text."""
    from zoo.cli._output import print_json
    from zoo.generation import load_writer

    writer = load_writer(model, tokenizer=tokenizer, device=device)
    live = stream and not as_json
    if live:
        print(prompt, end="", flush=True)
    text = writer.write(
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_text=(lambda piece: print(piece, end="", flush=True)) if live else None,
    )
    if as_json:
        print_json({"model": model, "prompt": prompt, "text": text})
    else:
        print("" if live else prompt + text)
