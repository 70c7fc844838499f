/** The slice of the REST API that the page reads. */

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

interface Page<T> {
  data: T[];
  has_more: boolean;
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

  private async get<T>(path: string): Promise<T> {
    const response = await fetch(path, {
      headers: { authorization: `Bearer ${this.key}` },
      cache: "no-store",
    });
    if (!response.ok) {
      const body = (await response.json().catch(() => null)) as {
        error?: { message?: string };
      } | null;
      throw new ApiFailure(
        response.status,
        body?.error?.message ?? `The server answered ${response.status}.`,
      );
    }
    return (await response.json()) as T;
  }
}
