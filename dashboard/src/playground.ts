/**
 * The playground: one prompt, two models side by side, streaming.
 *
 * `?left=…&right=…&prompt=…&system=…&max_tokens=…` fills it in, and `&run` answers at once.
 */

import { Client, type ChatChunk, type ChatRequest } from "./api";
import { isRefusedKey, show } from "./session";
import { element, make } from "./view";

/** One model's answer. */
class Side {
  readonly card = make("section", "", "card");
  private readonly model = document.createElement("input");
  private readonly output = make("output", "", "answer");
  private readonly facts = make("p", "", "hint");

  constructor(name: string, model: string) {
    const label = make("label", `${name} model`);
    this.model.id = `${name.toLowerCase()}-model`;
    label.setAttribute("for", this.model.id);
    this.model.setAttribute("list", "models");
    this.model.value = model;
    this.model.spellcheck = false;
    this.output.id = `${name.toLowerCase()}-answer`;
    this.output.setAttribute("aria-live", "polite");
    this.card.append(label, this.model, this.output, this.facts);
  }

  get modelName(): string {
    return this.model.value.trim();
  }

  /** Asks, and shows the answer as it comes. */
  async answer(client: Client, request: Omit<ChatRequest, "model">, signal: AbortSignal): Promise<void> {
    this.output.textContent = "";
    this.facts.textContent = this.modelName === "" ? "" : "Waiting for the first token";
    delete this.card.dataset["state"];
    if (this.modelName === "") return;
    const start = performance.now();
    let first: number | null = null;
    let last: ChatChunk | null = null;
    let reason: string | null = null;
    try {
      for await (const chunk of client.chat({ ...request, model: this.modelName }, signal)) {
        first ??= chunk.choices.length > 0 ? performance.now() : null;
        this.output.append(chunk.choices[0]?.delta.content ?? "");
        reason = chunk.choices[0]?.finish_reason ?? reason;
        last = chunk;
      }
    } catch (error) {
      if (isRefusedKey(error)) return;
      this.card.dataset["state"] = "failed";
      this.facts.textContent = signal.aborted ? "Stopped" : (error as Error).message;
      return;
    }
    const tokens = last?.usage?.completion_tokens;
    const seconds = (performance.now() - (first ?? start)) / 1000;
    const facts = [
      tokens === undefined ? null : `${tokens} tokens`,
      first === null ? null : `first after ${((first - start) / 1000).toFixed(2)} s`,
      tokens === undefined || tokens < 2 ? null : `${((tokens - 1) / seconds).toFixed(1)} tokens/s`,
      reason === "length" ? "cut at the limit" : null,
    ];
    this.facts.textContent = facts.filter((fact) => fact !== null).join(" · ");
    this.card.dataset["state"] = "done";
  }
}

export async function openPlayground(key: string): Promise<void> {
  const client = new Client(key);
  document.title = "Playground · tunesmith";
  const asked = new URLSearchParams(location.search);
  let names: string[];
  try {
    names = await client.models();
  } catch (error) {
    if (isRefusedKey(error)) return;
    throw error;
  }
  const tuned = names.find((name) => name.startsWith("ft:")) ?? "";
  const base = tuned.split(":")[1] ?? names[0] ?? "";
  const sides = [
    new Side("Left", asked.get("left") ?? base),
    new Side("Right", asked.get("right") ?? tuned),
  ];
  element("sides").replaceChildren(...sides.map((side) => side.card));
  element("models").replaceChildren(
    ...names.map((name) => {
      const option = document.createElement("option");
      option.value = name;
      return option;
    }),
  );
  const field = (id: string): HTMLInputElement => element<HTMLInputElement>(id);
  field("prompt").value = asked.get("prompt") ?? "";
  field("system").value = asked.get("system") ?? "";
  field("max-tokens").value = asked.get("max_tokens") ?? field("max-tokens").value;
  show("playground");

  const form = element<HTMLFormElement>("playground");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    void run();
  });

  async function run(): Promise<void> {
    const running = new AbortController();
    const stop = (): void => running.abort();
    const system = field("system").value.trim();
    const request = {
      messages: [
        ...(system === "" ? [] : [{ role: "system", content: system }]),
        { role: "user", content: field("prompt").value },
      ],
      temperature: field("temperature").valueAsNumber,
      max_tokens: field("max-tokens").valueAsNumber,
    };
    field("answer").disabled = true;
    element("stop").hidden = false;
    element("stop").addEventListener("click", stop);
    await Promise.all(sides.map((side) => side.answer(client, request, running.signal)));
    element("stop").removeEventListener("click", stop);
    element("stop").hidden = true;
    field("answer").disabled = false;
    form.dataset["state"] = "done";
  }

  if (asked.has("run") && form.reportValidity()) await run();
}
