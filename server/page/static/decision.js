// The rule `greedy` of models/decision.py, in the same fp32 arithmetic.

export const RESPOND = -1;

export const sigmoid = (x) => (x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x)));

export const sensitivityOf = sigmoid;

export function biasOfSensitivity(sensitivity) {
  if (sensitivity <= 0) return -Infinity;
  if (sensitivity >= 1) return Infinity;
  return Math.log(sensitivity) - Math.log1p(-sensitivity);
}

/**
 * Returns what is added to the margins, one entry a category and the respond token's last. Where a
 * bias is infinite only such categories stay in the race, and the largest margin among them wins.
 */
export function shiftOf(biases) {
  const shift = Float32Array.from([...biases, 0]);
  if (shift.includes(Infinity)) {
    for (let c = 0; c < shift.length; c++) shift[c] = shift[c] === Infinity ? 0 : -Infinity;
  }
  return shift;
}

/**
 * Returns the refused category's index, or RESPOND. Ties refuse, in manifest order.
 *
 * margins: Float32Array whose entries from `offset` on are the prompt's, one a category.
 */
export function decide(margins, shift, offset = 0) {
  const count = shift.length - 1;
  let best = -Infinity;
  let winner = -2;
  for (let c = 0; c < count; c++) {
    const score = Math.fround(margins[offset + c] + shift[c]);
    if (winner === -2 || score > best) {
      best = score;
      winner = c;
    }
  }
  return winner === -2 || shift[count] > best ? RESPOND : winner;
}

/** Returns the decisions of many prompts; margins: Float32Array of [prompts, categories]. */
export function decideAll(margins, biases) {
  const shift = shiftOf(biases);
  const count = biases.length;
  const decisions = new Int8Array(margins.length / count);
  for (let row = 0; row < decisions.length; row++) {
    decisions[row] = decide(margins, shift, row * count);
  }
  return decisions;
}

/**
 * Returns where one prompt flips as one dial moves and the others stay: below `bias` the outcome is
 * `below`, from it on the prompt is refused for the category. `bias` is Infinity where only
 * `always` could do it.
 */
export function flipOf(margins, biases, category) {
  const without = biases.map((bias, c) => (c === category ? -Infinity : bias));
  const below = decide(margins, shiftOf(without));
  if (without.includes(Infinity)) return { bias: Infinity, below };
  const toBeat = below === RESPOND ? 0 : margins[below] + biases[below];
  return { bias: toBeat - margins[category], below };
}
