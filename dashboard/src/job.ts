/** The page of one job: reads it every second until it has ended. */

import { ApiFailure, Client, type Checkpoint, type Job, type JobEvent, type StepMetrics } from "./api";
import { LossChart, SmallChart } from "./charts";
import { number } from "./curve";
import { isRefusedKey, show, showMessage } from "./session";
import {
  element,
  isTerminal,
  showEvents,
  showHyperparameters,
  showJob,
  showProgress,
  showTiles,
  showWeights,
  statusWord,
} from "./view";

const POLL_MS = 1000;
const RETRY_MS = 4000;

const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

/** Everything known of the job, and the charts that draw it. */
class JobPage {
  private readonly rows: StepMetrics[] = [];
  /** Newest first. */
  private events: JobEvent[] = [];
  private checkpoints: Checkpoint[] = [];
  private olderEvents = false;
  private readonly loss = new LossChart(element("loss-chart"));
  private readonly small = [
    new SmallChart(element("rate-chart"), "Learning rate", (row) => row.learning_rate),
    new SmallChart(element("norm-chart"), "Gradient norm", (row) => row.grad_norm),
    new SmallChart(element("speed-chart"), "Tokens/s", (row) => row.tokens_per_second),
  ];

  constructor(
    private readonly jobId: string,
    private readonly client: Client,
  ) {
    const smoothing = element<HTMLInputElement>("smoothing");
    const setSmoothing = (): void => {
      element("smoothing-value").textContent = smoothing.valueAsNumber.toFixed(2);
      this.loss.setSmoothing(smoothing.valueAsNumber);
    };
    smoothing.addEventListener("input", setSmoothing);
    setSmoothing();
    const logScale = element<HTMLInputElement>("log-scale");
    logScale.addEventListener("change", () => this.loss.setLogScale(logScale.checked));
    element("older-events").addEventListener("click", () => void this.loadOlderEvents());
  }

  /** Reads what is new and shows it. */
  async refresh(): Promise<Job> {
    const [job, rows, events, checkpoints] = await Promise.all([
      this.client.job(this.jobId),
      this.client.metricsAfter(this.jobId, this.rows.at(-1)?.step ?? 0),
      this.client.events(this.jobId),
      this.client.checkpoints(this.jobId),
    ]);
    this.rows.push(...rows);
    this.checkpoints = checkpoints;
    this.mergeEvents(events.data, events.has_more);
    this.render(job);
    return job;
  }

  private mergeEvents(newest: JobEvent[], hasMore: boolean): void {
    const known = new Set(this.events.map((event) => event.id));
    const fresh = newest.filter((event) => !known.has(event.id));
    // More than a page's worth is new: what lies between is fetched on demand.
    if (known.size === 0 || fresh.length === newest.length) {
      this.events = newest;
      this.olderEvents = hasMore;
    } else {
      this.events = [...fresh, ...this.events];
    }
  }

  private async loadOlderEvents(): Promise<void> {
    const page = await this.client.events(this.jobId, this.events.at(-1)?.id);
    this.events.push(...page.data);
    this.olderEvents = page.has_more;
    showEvents(this.events, this.olderEvents);
  }

  private totalSteps(): number | null {
    return this.events.find((event) => event.data?.total_steps !== undefined)?.data?.total_steps ?? null;
  }

  private render(job: Job): void {
    show("job");
    const loss = this.rows.at(-1)?.train_loss;
    const figure = loss === undefined ? "" : `${number(loss)} · `;
    document.title = `${figure}${statusWord(job)} · ${job.fine_tuned_model ?? job.id}`;
    showJob(job);
    showProgress(job, this.rows, this.totalSteps());
    showTiles(job, this.rows);
    showHyperparameters(job);
    showWeights(job, this.checkpoints);
    showEvents(this.events, this.olderEvents);
    this.loss.show(this.rows, this.checkpoints.map((checkpoint) => checkpoint.step_number));
    for (const chart of this.small) chart.show(this.rows);
    element("loss-chart").setAttribute(
      "aria-label",
      loss === undefined
        ? "Loss by step: no step yet"
        : `Loss by step: ${this.rows.length} steps, from ${number(this.rows[0]?.train_loss)} to ${number(loss)}`,
    );
  }
}

/** Polls until the job has ended or the key is refused. */
export async function follow(jobId: string, key: string): Promise<void> {
  const page = new JobPage(jobId, new Client(key));
  const connection = element("connection");
  for (;;) {
    try {
      const job = await page.refresh();
      connection.textContent = isTerminal(job) ? "" : "live";
      if (isTerminal(job)) return;
      await pause(POLL_MS);
    } catch (error) {
      connection.textContent = "";
      if (isRefusedKey(error)) return;
      if (error instanceof ApiFailure && error.httpStatus === 404) {
        return showMessage("No such job", `${error.message} It may belong to another project than your key.`);
      }
      if (!(error instanceof ApiFailure || error instanceof TypeError)) throw error;
      connection.textContent = "no answer from the server, trying again";
      await pause(RETRY_MS);
    }
  }
}
