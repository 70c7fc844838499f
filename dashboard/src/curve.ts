/** Pure functions from numbers to what the page shows. */

import type { StepMetrics } from "./api";

/**
 * Exponential moving average with Adam's bias correction, so that the first values are not drawn
 * towards zero: mean(t) = Σ fᵗ⁻ⁱ·xᵢ / Σ fᵗ⁻ⁱ.
 */
export function smooth(values: readonly number[], factor: number): number[] {
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    sum = factor * sum + value;
    weight = factor * weight + 1;
    return sum / weight;
  });
}

/** The step's validation loss: over the whole set where that was measured. */
export function validLoss(row: StepMetrics): number | null {
  return row.full_valid_loss ?? row.valid_loss;
}

/** Seconds that the steps still to come will take at the recent pace; null when unknown. */
export function secondsLeft(rows: readonly StepMetrics[], totalSteps: number): number | null {
  const RECENT_STEPS = 20;
  const last = rows.at(-1);
  if (last === undefined) return null;
  const first = rows.length > RECENT_STEPS ? rows[rows.length - 1 - RECENT_STEPS] : undefined;
  const steps = last.step - (first?.step ?? 0);
  const seconds = last.elapsed_seconds - (first?.elapsed_seconds ?? 0);
  return steps > 0 ? ((totalSteps - last.step) * seconds) / steps : null;
}

/** `75` → `1 min 15 s`. */
export function duration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor((whole % 3600) / 60);
  if (hours > 0) return `${hours} h ${minutes} min`;
  if (minutes > 0) return `${minutes} min ${whole % 60} s`;
  return `${whole} s`;
}

/** Four significant digits; powers of ten, with three, for the very small. */
export function number(value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value !== 0 && Math.abs(value) < 1e-3) return Number(value.toPrecision(3)).toExponential();
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

export function integer(value: number | null | undefined): string {
  return value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en");
}
