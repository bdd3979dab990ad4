// A calibration's curve of one category: what each bias does to its prompts and to benign ones.

/** Returns a curve's value at a bias, between its points in a straight line. */
export function valueAt(curve, bias, field) {
  const last = curve.length - 1;
  if (bias <= curve[0].bias) return bias === -Infinity ? 0 : curve[0][field];
  if (bias >= curve[last].bias) return curve[last][field];
  let low = 0;
  let high = last;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (curve[middle].bias <= bias) low = middle;
    else high = middle;
  }
  const share = (bias - curve[low].bias) / (curve[high].bias - curve[low].bias);
  return curve[low][field] + share * (curve[high][field] - curve[low][field]);
}

/** Returns the least bias of the curve at which that share of the category's prompts is refused. */
export function biasOfRate(curve, rate) {
  const at = curve.findIndex((point) => point.refusal_rate >= rate);
  if (at <= 0) return at < 0 ? curve.at(-1).bias : curve[0].bias;
  const [low, high] = [curve[at - 1], curve[at]];
  const share = (rate - low.refusal_rate) / (high.refusal_rate - low.refusal_rate);
  return low.bias + share * (high.bias - low.bias);
}

/** Returns the greatest bias whose false refusals stay below a limit with confidence. */
export function biasOfFalseRefusals(curve, limit) {
  const kept = curve.filter((point) => point.false_refusal_rate_interval[1] <= limit);
  return kept.length ? kept.at(-1).bias : curve[0].bias;
}
