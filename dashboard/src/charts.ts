/** The loss curve and the small charts beside it, drawn by uPlot. */

import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import type { StepMetrics } from "./api";
import { number, smooth, validLoss } from "./curve";

const LOSS_HEIGHT = 340;
const SMALL_HEIGHT = 130;

/** A colour of the style sheet, as the current scheme has it. */
function colour(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function axis(options: uPlot.Axis = {}): uPlot.Axis {
  return {
    stroke: colour("--muted"),
    grid: { stroke: colour("--grid"), width: 1 },
    ticks: { stroke: colour("--grid"), width: 1 },
    font: "12px system-ui, sans-serif",
    ...options,
  };
}

/** Steps are whole numbers: no tick at 1.5. */
const stepAxis: uPlot.Axis = {
  incrs: [1, 10, 100, 1000, 10_000, 100_000].flatMap((power) => [power, 2 * power, 5 * power]),
};

const stepValue = (_: uPlot, value: number | null): string => (value === null ? "–" : String(value));
const plainValue = (_: uPlot, value: number | null): string => number(value);
const plainTicks = (_: uPlot, splits: (number | null)[]): string[] =>
  splits.map((split) => (split === null ? "" : number(split)));

/** The legend speaks of the last step while the pointer is elsewhere. */
function showLastStep(plot: uPlot): void {
  if (plot.cursor.idx === null || plot.cursor.idx === undefined) {
    plot.setLegend({ idx: plot.data[0].length - 1 });
  }
}

/** Keeps one uPlot in an element: of the element's width, and in the colours of the scheme. */
abstract class Chart {
  private plot: uPlot | undefined;

  constructor(
    protected readonly element: HTMLElement,
    private readonly height: number,
  ) {
    new ResizeObserver(() => {
      if (this.element.clientWidth > 0) {
        this.plot?.setSize({ width: this.element.clientWidth, height: this.height });
      }
    }).observe(element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.rebuild());
  }

  protected abstract options(): Omit<uPlot.Options, "width" | "height">;
  protected abstract data(): uPlot.AlignedData;

  protected rebuild(): void {
    this.plot?.destroy();
    this.plot = undefined;
    this.refresh();
  }

  protected refresh(): void {
    const data = this.data();
    if (data[0].length === 0) return;
    if (this.plot === undefined) {
      const size = { width: this.element.clientWidth, height: this.height };
      const options = this.options();
      options.hooks = { ...options.hooks, setCursor: [showLastStep] };
      this.plot = new uPlot({ ...options, ...size }, data, this.element);
    } else {
      this.plot.setData(data);
    }
    showLastStep(this.plot);
  }
}

/** Training loss, its smoothed line, validation loss, and the steps with a checkpoint. */
export class LossChart extends Chart {
  private rows: readonly StepMetrics[] = [];
  private checkpointSteps: readonly number[] = [];
  private smoothing = 0;
  private logScale = false;

  constructor(element: HTMLElement) {
    super(element, LOSS_HEIGHT);
  }

  show(rows: readonly StepMetrics[], checkpointSteps: readonly number[]): void {
    this.rows = rows;
    this.checkpointSteps = checkpointSteps;
    this.refresh();
  }

  setSmoothing(factor: number): void {
    this.smoothing = factor;
    this.refresh();
  }

  setLogScale(on: boolean): void {
    this.logScale = on;
    this.rebuild();
  }

  protected override data(): uPlot.AlignedData {
    const losses = this.rows.map((row) => row.train_loss);
    return [
      this.rows.map((row) => row.step),
      losses,
      smooth(losses, this.smoothing),
      this.rows.map(validLoss),
    ];
  }

  protected override options(): Omit<uPlot.Options, "width" | "height"> {
    const lossTicks: uPlot.Axis = { values: plainTicks, size: 56 };
    return {
      scales: {
        x: { time: false },
        y: this.logScale ? { distr: 3 } : { range: { min: { pad: 0.08 }, max: { pad: 0.08 } } },
      },
      axes: [axis(stepAxis), axis(lossTicks)],
      series: [
        { label: "Step", value: stepValue },
        {
          label: "Training loss",
          stroke: colour("--train-faint"),
          width: 1.25,
          value: plainValue,
          points: { show: this.rows.length < 2 },
        },
        { label: "Smoothed", stroke: colour("--train"), width: 2.5, value: plainValue, points: { show: false } },
        {
          label: "Validation loss",
          stroke: colour("--valid"),
          width: 2,
          value: plainValue,
          spanGaps: true,
          points: { show: true, size: 7, fill: colour("--valid") },
        },
      ],
      cursor: { points: { size: 8 } },
      legend: { live: true },
      hooks: { drawAxes: [(plot) => this.drawCheckpoints(plot)] },
    };
  }

  private drawCheckpoints(plot: uPlot): void {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = colour("--checkpoint");
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([3 * devicePixelRatio, 4 * devicePixelRatio]);
    for (const step of this.checkpointSteps) {
      const x = Math.round(plot.valToPos(step, "x", true));
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }
}

/** One column of the metrics. */
export class SmallChart extends Chart {
  private rows: readonly StepMetrics[] = [];

  constructor(
    element: HTMLElement,
    private readonly label: string,
    private readonly column: (row: StepMetrics) => number,
  ) {
    super(element, SMALL_HEIGHT);
  }

  show(rows: readonly StepMetrics[]): void {
    this.rows = rows;
    this.refresh();
  }

  protected override data(): uPlot.AlignedData {
    return [this.rows.map((row) => row.step), this.rows.map(this.column)];
  }

  protected override options(): Omit<uPlot.Options, "width" | "height"> {
    return {
      scales: { x: { time: false }, y: { range: { min: { soft: 0, mode: 1, pad: 0.1 }, max: { pad: 0.1 } } } },
      axes: [axis({ ...stepAxis, size: 28, space: 36 }), axis({ values: plainTicks, size: 62, space: 28 })],
      series: [
        { label: "Step", value: stepValue },
        { label: this.label, stroke: colour("--train"), width: 1.5, value: plainValue, points: { show: false } },
      ],
      cursor: { points: { size: 6 } },
      legend: { live: true },
    };
  }
}
