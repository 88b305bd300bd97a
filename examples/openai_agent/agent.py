"""Hold two conversations by the OpenAI API: one in which the model names a number, and one in which it names a greater one."""

import httpx
import openai

# Processes are used again, so one pool of connections and its TLS settings serve many rollouts.
HTTP = httpx.Client(timeout=600)


def agent(base_url, api_key, row):
    """Ask for a number, and elsewhere for a greater one; two right answers are worth 1."""
    client = openai.OpenAI(base_url=base_url, api_key=api_key, http_client=HTTP)
    number, asked = name_a_number(client, row["prompt"])
    if number is None:
        return {"reward": 0.0, "valid": 0.0, "greater": 0.0, "asked": asked}
    greater = ask(client, [{"role": "user", "content": f"{number}<"}])
    valid = 1.0 if greater.isdecimal() else 0.0
    hit = 1.0 if valid and int(greater) > number else 0.0
    return {"reward": 0.2 + 0.2 * valid + 0.6 * hit, "valid": valid, "greater": hit, "asked": asked}


def name_a_number(client, messages):
    """Ask until the answer is a number, at most twice; return it, and how often the model was asked."""
    messages = list(messages)
    for asked in (1, 2):
        answer = ask(client, messages)
        if answer.isdecimal():
            return int(answer), asked
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "?"}]
    return None, asked


def ask(client, messages):
    """Return the model's answer to messages."""
    response = client.chat.completions.create(model="policy", messages=messages)
    return response.choices[0].message.content
