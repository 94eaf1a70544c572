"""OpenAI's Python client against a server of ours: an answer whole and streamed, in a form, and many at once.

pagellm serve --port 8000
pip install openai
python examples/client.py --url http://localhost:8000/v1
"""

import argparse
import asyncio

import openai

SCHEMA = {
    "type": "object",
    "properties": {"title": {"type": "string", "maxLength": 40}, "year": {"type": "integer"}},
    "required": ["title", "year"],
    "additionalProperties": False,
}


async def main() -> None:
    """Asks, and prints what comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--key", default="unused", help="one of the server's, if it has some")
    options = parser.parse_args()
    async with openai.AsyncOpenAI(base_url=options.url, api_key=options.key) as client:
        model = (await client.models.list()).data[0].id
        ask = {"model": model, "max_tokens": 48, "seed": 1}
        question = [{"role": "user", "content": "Who wrote Hamlet?"}]

        whole = await client.chat.completions.create(messages=question, **ask)
        print("whole:   ", whole.choices[0].message.content)

        print("streamed: ", end="")
        said = ""
        stream = await client.chat.completions.create(messages=question, stream=True, **ask)
        async for chunk in stream:
            piece = chunk.choices[0].delta.content or ""
            said += piece
            print(piece, end="", flush=True)
        print()
        assert said == whole.choices[0].message.content, "the same seed gives the same answer"

        form = {"type": "json_schema", "json_schema": {"name": "play", "schema": SCHEMA}}
        formed = await client.chat.completions.create(
            messages=[{"role": "user", "content": "Name a play and its year."}], response_format=form, **ask
        )
        print("in a form:", formed.choices[0].message.content)

        prompts = [f"{number} is a number that" for number in range(8)]
        many = await asyncio.gather(
            *(client.completions.create(prompt=prompt, **ask | {"max_tokens": 12}) for prompt in prompts)
        )
        for prompt, answer in zip(prompts, many, strict=True):
            print("at once: ", prompt + answer.choices[0].text.replace("\n", " "))


if __name__ == "__main__":
    asyncio.run(main())
