// What a set of decided prompts says.

const Z = 1.959963984540054;

/** Returns the 95 % interval of a share by Wilson. Source: J. Am. Stat. Assoc. 22 (1927). */
export function wilson(count, n) {
  if (n === 0) return [0, 1];
  const share = count / n;
  const square = (Z * Z) / n;
  const centre = share + square / 2;
  const half = Z * Math.sqrt((share * (1 - share)) / n + square / (4 * n));
  const low = count === 0 ? 0 : (centre - half) / (1 + square);
  const high = count === n ? 1 : (centre + half) / (1 + square);
  return [low, high];
}

/**
 * Returns counts as [labels, decisions], row-major with k + 1 columns: categories in manifest
 * order, then benign and answered.
 *
 * labels: k is benign, a negative one leaves the prompt out. decisions: RESPOND is answered.
 */
export function confusion(labels, decisions, categories) {
  const width = categories + 1;
  const counts = new Int32Array(width * width);
  for (let row = 0; row < labels.length; row++) {
    if (labels[row] < 0) continue;
    const decision = decisions[row] < 0 ? categories : decisions[row];
    counts[labels[row] * width + decision]++;
  }
  return counts;
}

/** Returns one row of a confusion matrix as words: how many prompts, refused, for their own token. */
export function rowOf(counts, label, categories) {
  const width = categories + 1;
  const row = counts.subarray(label * width, (label + 1) * width);
  const prompts = row.reduce((sum, count) => sum + count, 0);
  return { prompts, refused: prompts - row[categories], own: label < categories ? row[label] : 0 };
}
