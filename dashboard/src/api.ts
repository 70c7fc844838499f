/** The slice of the REST API that the pages use. */

export type JobStatus =
  | "validating_files"
  | "queued"
  | "running"
  | "succeeded"
  | "failed"
  | "cancelled";

export interface Job {
  id: string;
  created_at: number;
  finished_at: number | null;
  estimated_finish?: number | null;
  status: JobStatus;
  paused?: boolean;
  model: string;
  fine_tuned_model: string | null;
  trained_tokens: number | null;
  training_file: string;
  validation_file: string | null;
  seed: number;
  hyperparameters: Record<string, unknown>;
  method?: { type: string } & Record<string, unknown>;
  error: { code: string; message: string; param: string | null } | null;
}

/** One optimiser step of the loss curve. */
export interface StepMetrics {
  step: number;
  epoch: number;
  train_loss: number;
  valid_loss: number | null;
  full_valid_loss?: number | null;
  learning_rate: number;
  grad_norm: number;
  tokens: number;
  tokens_per_second: number;
  elapsed_seconds: number;
}

export interface JobEvent {
  id: string;
  created_at: number;
  level: "info" | "warn" | "error";
  message: string;
  type: "message" | "metrics";
  data?: { total_steps?: number } | null;
}

export interface Checkpoint {
  id: string;
  created_at: number;
  fine_tuned_model_checkpoint: string;
  step_number: number;
  metrics: { train_loss?: number; valid_loss?: number; full_valid_loss?: number };
}

export interface ChatRequest {
  model: string;
  messages: { role: string; content: string }[];
  temperature: number;
  max_tokens: number;
}

/** One event of a streamed answer. */
export interface ChatChunk {
  choices: { delta: { content?: string | null }; finish_reason: string | null }[];
  usage?: { completion_tokens: number } | null;
}

interface Page<T> {
  data: T[];
  has_more: boolean;
}

interface Failure {
  error?: { message?: string };
}

/** A reply with an error status, in the words of the server. */
export class ApiFailure extends Error {
  constructor(
    readonly httpStatus: number,
    message: string,
  ) {
    super(message);
  }
}

/** Reads with one key; a lost connection shows as the `TypeError` of fetch. */
export class Client {
  constructor(private readonly key: string) {}

  job(id: string): Promise<Job> {
    return this.get(`/v1/fine_tuning/jobs/${encodeURIComponent(id)}`);
  }

  /** All steps after `step`. */
  async metricsAfter(id: string, step: number): Promise<StepMetrics[]> {
    const all: StepMetrics[] = [];
    for (;;) {
      const after = all.at(-1)?.step ?? step;
      const page = await this.get<Page<StepMetrics>>(
        `/v1/fine_tuning/jobs/${encodeURIComponent(id)}/metrics?after=${after}`,
      );
      const fresh = page.data.filter((row) => row.step > after);
      all.push(...fresh);
      if (!page.has_more || fresh.length === 0) return all;
    }
  }

  /** Newest first; `after` is the id of the last one that is known. */
  events(id: string, after?: string): Promise<Page<JobEvent>> {
    const cursor = after === undefined ? "" : `&after=${encodeURIComponent(after)}`;
    return this.get(`/v1/fine_tuning/jobs/${encodeURIComponent(id)}/events?limit=100${cursor}`);
  }

  async checkpoints(id: string): Promise<Checkpoint[]> {
    const page = await this.get<Page<Checkpoint>>(
      `/v1/fine_tuning/jobs/${encodeURIComponent(id)}/checkpoints?limit=100`,
    );
    return page.data;
  }

  /** Names of all models that the key may use, tuned ones too. */
  async models(): Promise<string[]> {
    const page = await this.get<Page<{ id: string }>>("/v1/models");
    return page.data.map((model) => model.id);
  }

  /** An answer as it is made. */
  async *chat(request: ChatRequest, signal: AbortSignal): AsyncGenerator<ChatChunk> {
    const response = await this.send("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const part = await reader?.read();
      if (part === undefined || part.done) return;
      text += part.value;
      const events = text.split("\n\n");
      text = events.pop() ?? "";
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data: "));
        if (data.length === 0 || data[0] === "data: [DONE]") continue;
        const chunk = JSON.parse(data.map((line) => line.slice(6)).join("\n")) as ChatChunk & Failure;
        if (chunk.error !== undefined) throw new ApiFailure(500, chunk.error.message ?? "The answer broke off.");
        yield chunk;
      }
    }
  }

  private async get<T>(path: string): Promise<T> {
    return (await (await this.send(path, {})).json()) as T;
  }

  private async send(path: string, init: RequestInit): Promise<Response> {
    const response = await fetch(path, {
      ...init,
      headers: { ...init.headers, authorization: `Bearer ${this.key}` },
      cache: "no-store",
    });
    if (!response.ok) {
      const body = (await response.json().catch(() => null)) as Failure | null;
      throw new ApiFailure(
        response.status,
        body?.error?.message ?? `The server answered ${response.status}.`,
      );
    }
    return response;
  }
}
