// Numbers as people read them.

const MINUS = "−";

export const percent = (share) =>
  share === null || Number.isNaN(share)
    ? "–"
    : `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

export const interval = ([low, high]) => `${(low * 100).toFixed(0)}–${(high * 100).toFixed(0)} %`;

export function bias(value) {
  if (value === Infinity) return "always";
  if (value === -Infinity) return "never";
  if (Math.abs(value) < 0.005) return "0";
  return `${value < 0 ? MINUS : "+"}${Math.abs(value).toFixed(2)}`;
}

/** Percentage points with a sign. */
export function points(difference) {
  if (Number.isNaN(difference)) return "–";
  const rounded = (difference * 100).toFixed(1);
  if (Number(rounded) === 0) return "0";
  return `${difference < 0 ? MINUS : "+"}${Math.abs(rounded)}`;
}

export const number = (value) => value.toLocaleString("en");
