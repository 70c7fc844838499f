/** What the page shows of a job: text and lists. The server's words only ever become text nodes. */

import type { Checkpoint, Job, JobEvent, StepMetrics } from "./api";
import { duration, integer, number, secondsLeft, validLoss } from "./curve";

export function element<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`index.html has no element #${id}`);
  return found as T;
}

export function make(tag: string, text: string, className?: string): HTMLElement {
  const node = document.createElement(tag);
  node.textContent = text;
  if (className !== undefined) node.className = className;
  return node;
}

const shown = new Map<string, string>();

/**
 * Whether `value` differs from what the element shows. A list that did not change is left alone:
 * the keyboard's focus, a selection and the scroll position stay.
 */
function isNew(id: string, value: unknown): boolean {
  const text = JSON.stringify(value);
  if (shown.get(id) === text) return false;
  shown.set(id, text);
  return true;
}

function clock(seconds: number): string {
  return new Date(seconds * 1000).toLocaleString(undefined, {
    dateStyle: "medium",
    timeStyle: "medium",
  });
}

const STATUS_WORDS: Record<Job["status"], string> = {
  validating_files: "validating files",
  queued: "queued",
  running: "running",
  succeeded: "succeeded",
  failed: "failed",
  cancelled: "cancelled",
};

export function statusWord(job: Job): string {
  return job.paused === true ? "paused" : STATUS_WORDS[job.status];
}

export function isTerminal(job: Job): boolean {
  return job.status === "succeeded" || job.status === "failed" || job.status === "cancelled";
}

/** Heading, status and the job's error. */
export function showJob(job: Job): void {
  element("job-name").textContent = job.fine_tuned_model ?? job.id;
  const chip = element("status");
  chip.textContent = statusWord(job);
  chip.dataset["status"] = job.paused === true ? "paused" : job.status;
  const facts = [
    `${job.method?.type ?? "supervised"} fine-tuning of ${job.model}`,
    job.fine_tuned_model === null ? null : job.id,
    `created ${clock(job.created_at)}`,
    job.finished_at === null ? null : `finished ${clock(job.finished_at)}`,
  ];
  element("facts").textContent = facts.filter((fact) => fact !== null).join(" · ");

  element("failure").hidden = job.error === null || job.status !== "failed";
  element("failure-text").textContent = job.error?.message ?? "";
  element("failure-code").textContent =
    job.error === null ? "" : [job.error.code, job.error.param].filter(Boolean).join(" · ");
}

/** Bar and sentence. `totalSteps` is null until the trainer has said it. */
export function showProgress(job: Job, rows: readonly StepMetrics[], totalSteps: number | null): void {
  const last = rows.at(-1);
  const step = last?.step ?? 0;
  const share = job.status === "succeeded" ? 1 : totalSteps === null ? 0 : step / totalSteps;
  element("bar-fill").style.width = `${(share * 100).toFixed(2)}%`;
  element("bar").setAttribute("aria-valuenow", String(Math.round(share * 100)));
  element("bar").dataset["status"] = job.status;

  const where = totalSteps === null ? `step ${step}` : `step ${integer(step)} of ${integer(totalSteps)}`;
  const parts = last === undefined ? [] : [where, `epoch ${last.epoch.toFixed(2)}`, `${duration(last.elapsed_seconds)} of training`];
  if (job.status === "running" && totalSteps !== null) {
    const left = secondsLeft(rows, totalSteps);
    if (left !== null) parts.push(`about ${duration(left)} left`);
  }
  const waiting: Partial<Record<Job["status"], string>> = {
    validating_files: "The files are being checked row by row.",
    queued:
      job.paused === true
        ? "Paused: it goes on from its last checkpoint when it is resumed."
        : "Waits for a free worker.",
    running: "A worker loads the model and the data.",
    cancelled: "Cancelled.",
  };
  const sentence = parts.join(" · ");
  const words = job.status === "running" && last !== undefined ? undefined : waiting[job.status];
  element("progress-text").textContent = [words, sentence].filter(Boolean).join(" ");
  const empty = element("loss-empty");
  empty.hidden = last !== undefined;
  empty.textContent = isTerminal(job) ? "The job ended before its first step." : "The curve begins with the first step.";
}

/** The latest numbers, large. */
export function showTiles(job: Job, rows: readonly StepMetrics[]): void {
  const last = rows.at(-1);
  const valids = rows.map(validLoss).filter((loss) => loss !== null);
  const best = valids.length > 0 ? Math.min(...valids) : null;
  const tiles: [string, string][] = [
    ["Training loss", number(last?.train_loss)],
    ["Validation loss", number(valids.at(-1))],
    ["Best validation", number(best)],
    ["Learning rate", number(last?.learning_rate)],
    ["Gradient norm", number(last?.grad_norm)],
    ["Tokens/s", integer(last?.tokens_per_second)],
    ["Tokens trained", integer(job.trained_tokens ?? last?.tokens)],
  ];
  element("tiles").hidden = last === undefined;
  element("small-charts").hidden = last === undefined;
  element("tiles").replaceChildren(
    ...tiles.map(([label, value]) => {
      const tile = make("div", "", "tile");
      tile.append(make("span", label, "label"), make("span", value, "value"));
      return tile;
    }),
  );
}

function flatten(values: Record<string, unknown>, prefix = ""): [string, string][] {
  return Object.entries(values).flatMap(([name, value]): [string, string][] => {
    if (Array.isArray(value)) return [[prefix + name, value.join(", ")]];
    if (value !== null && typeof value === "object") {
      return flatten(value as Record<string, unknown>, `${prefix}${name}.`);
    }
    return [[prefix + name, String(value)]];
  });
}

export function showHyperparameters(job: Job): void {
  const ofMethod = job.method?.[job.method.type] as
    | { hyperparameters?: Record<string, unknown> }
    | undefined;
  const pairs: [string, string][] = [
    ...flatten({ ...job.hyperparameters, ...ofMethod?.hyperparameters }),
    ["seed", String(job.seed)],
    ["training_file", job.training_file],
    ["validation_file", job.validation_file ?? "none"],
  ];
  if (!isNew("hyperparameters", pairs)) return;
  element("hyperparameters").replaceChildren(
    ...pairs.map(([name, value]) => {
      const row = document.createElement("tr");
      const head = make("th", name);
      head.setAttribute("scope", "row");
      row.append(head, make("td", value));
      return row;
    }),
  );
}

/** A line to copy, with a button that does. */
function command(text: string): HTMLElement {
  const line = make("div", "", "command");
  const code = make("code", text);
  const copy = make("button", "Copy", "quiet") as HTMLButtonElement;
  copy.type = "button";
  copy.setAttribute("aria-label", `Copy: ${text}`);
  copy.addEventListener("click", () => {
    navigator.clipboard.writeText(text).then(
      () => (copy.textContent = "Copied"),
      () => getSelection()?.selectAllChildren(code),
    );
  });
  line.append(code, copy);
  return line;
}

export function showWeights(job: Job, checkpoints: readonly Checkpoint[]): void {
  if (!isNew("weights", [job.fine_tuned_model, checkpoints])) return;
  const nodes: HTMLElement[] = [];
  if (job.fine_tuned_model !== null) {
    const link = make("a", "Compare with the base model in the playground");
    const models = new URLSearchParams({ left: job.model, right: job.fine_tuned_model });
    link.setAttribute("href", `/playground?${models.toString()}`);
    const paragraph = make("p", "");
    paragraph.append(link);
    nodes.push(
      make("h3", "The tuned model"),
      command(`tunesmith models weights ${job.fine_tuned_model}`),
      paragraph,
    );
  }
  if (checkpoints.length > 0) nodes.push(make("h3", "Checkpoints"));
  for (const checkpoint of checkpoints) {
    const { train_loss, valid_loss, full_valid_loss } = checkpoint.metrics;
    const valid = full_valid_loss ?? valid_loss;
    const losses = [
      train_loss === undefined ? null : `training loss ${number(train_loss)}`,
      valid === undefined ? null : `validation loss ${number(valid)}`,
    ];
    const facts = [`Step ${checkpoint.step_number}`, ...losses.filter((loss) => loss !== null)];
    nodes.push(
      make("p", facts.join(" · "), "checkpoint"),
      command(`tunesmith models weights ${checkpoint.fine_tuned_model_checkpoint}`),
    );
  }
  if (nodes.length === 0) nodes.push(make("p", "No checkpoint yet.", "empty"));
  element("weights").replaceChildren(...nodes);
}

/** `events` newest first. */
export function showEvents(events: readonly JobEvent[], olderRemain: boolean): void {
  element("older-events").hidden = !olderRemain;
  if (!isNew("events", events.map((event) => event.id))) return;
  element("events").replaceChildren(
    ...events.map((event) => {
      const item = make("li", "");
      item.dataset["level"] = event.level;
      const time = make("time", new Date(event.created_at * 1000).toLocaleTimeString());
      time.setAttribute("datetime", new Date(event.created_at * 1000).toISOString());
      time.title = clock(event.created_at);
      item.append(time, make("span", event.message));
      return item;
    }),
  );
}
