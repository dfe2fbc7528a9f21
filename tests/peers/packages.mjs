// What the scripts for node share: the packages that scripts/peers installed, and the transcript (see transcript.py).
import { createRequire } from "node:module";

/** `require` of the packages, which are not in a folder above this one. */
export const load = createRequire(new URL("../../target/peers/npm/package.json", import.meta.url));

/** Runs the scenarios that the command line names, at the same time, and prints a line of JSON for each. */
export async function run(scenarios) {
  const [url, ...names] = process.argv.slice(2);
  const chosen = names.includes("all") ? Object.keys(scenarios) : names;
  let failed = false;
  await Promise.all(
    chosen.map(async (name) => {
      let seen;
      try {
        seen = await scenarios[name](url);
      } catch (error) {
        failed = true;
        seen = { exception: String(error.stack) };
      }
      console.log(JSON.stringify({ scenario: name, seen }));
    }),
  );
  // Streams that a client keeps open don't hold the process.
  process.exit(failed ? 1 : 0);
}

/** The first true value of `condition`. */
export async function until(what, condition, seconds = 20) {
  const end = performance.now() + seconds * 1000;
  for (;;) {
    const value = await condition();
    if (value) return value;
    if (performance.now() > end) throw new Error(`did not happen within ${seconds} s: ${what}`);
    await sleep(50);
  }
}

export const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
