//! Rollout: the blocks that move new sessions between versions and that copy starts to another one.

use serde_json::json;

use super::read::{Block, Kind, Located, block, nearest};
use super::values::{choice, duration, integer, ratio, text};
use super::yaml::quote;
use super::{Judge, OnBad, Rollout, RolloutStep, Shadow};

/// A rollout with more steps is surely made by a program that lost count.
const STEPS_MAX: usize = 100;

/// Times, as in 1.5 times; far above any use.
const FACTOR_MAX: f64 = 1e6;

/// The rollout of a service whose versions have these names.
pub fn rollout<'k>(versions: &'k [String]) -> Kind<'k, Rollout> {
    block("a mapping with `from`, `to` and `steps`", move |block| {
        let from = block.required("from", "The version that new sessions leave.", version_of(versions));
        let to = block.required("to", "The version that they go to.", version_of(versions));
        let about = "Shares of `to` in the new sessions of both, one after the other.";
        let steps = block.required("steps", about, step().located().list());
        let judge = block.key("judge", "What counts as bad; compared with `from` in each step.", judge(), "{}");
        let on_bad = block.key(
            "on_bad",
            "abort: new sessions go back to `from`, running ones finish; pause: the shares stay until a person decides.",
            choice(&[("abort", OnBad::Abort), ("pause", OnBad::Pause)]),
            "abort",
        );
        if let (Some(from), Some(to)) = (&from, &to)
            && from == to
        {
            block.problem("to", format!("{to} is also `from`; a rollout goes from one version to another"));
        }
        let steps = steps?;
        check_steps(block, &steps);
        let steps = steps.into_iter().map(|step| step.value).collect();
        Some(Rollout { from: from?, to: to?, steps, judge, on_bad })
    })
}

/// The copies of a service whose versions have these names.
pub fn shadow<'k>(versions: &'k [String]) -> Kind<'k, Shadow> {
    block("{version: canary, percent: 10%}", move |block| {
        let version = block.required("version", "The version that gets copies.", version_of(versions));
        let above_zero = ratio().checked(|share| match *share > 0.0 {
            true => Ok(()),
            false => Err("at 0% nothing is copied; leave `shadow` out".to_owned()),
        });
        let share = block.key("percent", "The share of starts that is copied.", above_zero, "100%");
        Some(Shadow { version: version?, share })
    })
}

fn version_of<'k>(versions: &'k [String]) -> Kind<'k, String> {
    text().checked(move |name| {
        // A service without versions is told so already.
        if versions.is_empty() || versions.contains(name) {
            return Ok(());
        }
        let known = versions.iter().map(String::as_str);
        let hint = match nearest(name, known.clone()) {
            Some(near) => format!("did you mean {near}?"),
            None => format!("there is {}", known.collect::<Vec<_>>().join(", ")),
        };
        Err(format!("the service has no version {}; {hint}", quote(name)))
    })
}

fn step() -> Kind<'static, RolloutStep> {
    block("a step such as {weight: 5%, hold: 10m}", |block| {
        let about = "The part of the new sessions of `from` and `to` together that starts at `to`.";
        let share = block.required("weight", about, ratio());
        let hold = block.key("hold", "How long the step lasts at least.", duration(), "0s");
        Some(RolloutStep { share: share?, hold })
    })
}

fn check_steps(block: &mut Block, steps: &[Located<RolloutStep>]) {
    if steps.is_empty() && !block.has_items("steps") {
        block.problem("steps", "there is no step; add one, such as {weight: 100%}");
    }
    if steps.len() > STEPS_MAX {
        block.problem("steps", format!("there are {} steps; {STEPS_MAX} are allowed", steps.len()));
    }
    for step in steps {
        if step.value.share == 0.0 {
            step.warning(block.context(), "weight", "at 0% no session starts at `to`, so this step only waits");
        }
        if step.value.share == 1.0 && !step.value.hold.is_zero() {
            let message =
                "at 100% no session starts at `from`, so there is nothing to compare with: this step only waits";
            step.warning(block.context(), "hold", message);
        }
    }
    for pair in steps.windows(2).filter(|pair| pair[1].value.share <= pair[0].value.share) {
        let message = "this is no more than the step before; a rollout goes upwards";
        pair[1].warning(block.context(), "weight", message);
    }
    if let Some(last) = steps.last().filter(|last| last.value.share < 1.0) {
        let message = "this is the last step and below 100%, so the rollout completes with both versions serving";
        last.warning(block.context(), "weight", message);
    }
}

fn judge() -> Kind<'static, Judge> {
    block("a mapping with `min_runs`, `max_failed`, `worse_than_from`, `confidence`", |block| {
        let about = "Runs of each version in a step before a verdict and before the next step.";
        let min_runs = block.key("min_runs", about, integer(0, 1_000_000_000), "50");
        let about = "More failed runs than this are bad where `from` has fewer; null: not looked at.";
        let max_failed = block.key("max_failed", about, ratio().nullable(), "5%");
        let about = "How many times as bad as `from` is too bad.";
        let [failed_ratio, first_event_p95_ratio, duration_p95_ratio] =
            block.key("worse_than_from", about, worse_than_from(), "{}");
        let about = "How certain a difference must be, however often it is looked at.";
        let confidence = block.key("confidence", about, confidence(), "95%");
        let judged = [max_failed, failed_ratio, first_event_p95_ratio, duration_p95_ratio];
        if judged.iter().all(Option::is_none) {
            block.warning("", "nothing is looked at, so no version is ever bad and each step only waits");
        }
        Some(Judge { min_runs, max_failed, failed_ratio, first_event_p95_ratio, duration_p95_ratio, confidence })
    })
}

fn worse_than_from() -> Kind<'static, [Option<f64>; 3]> {
    block("a mapping with `failed`, `first_event_p95`, `duration_p95`", |block| {
        let about = "Of the part of the runs that fail; null: not looked at.";
        let failed = block.key("failed", about, factor().nullable(), "2.0");
        let about = "Of the time until the first event that 95% of the runs keep; null: not looked at.";
        let first_event = block.key("first_event_p95", about, factor().nullable(), "1.5");
        let about = "Of the duration that 95% of the completed runs keep; null: not looked at.";
        let duration = block.key("duration_p95", about, factor().nullable(), "1.5");
        for (name, factor) in [("failed", failed), ("first_event_p95", first_event), ("duration_p95", duration)] {
            if factor.is_some_and(|factor| factor < 1.0) {
                block.warning(name, "below 1 a version that is as good as `from` counts as worse");
            }
        }
        Some([failed, first_event, duration])
    })
}

/// How many times: a number above 0.
fn factor() -> Kind<'static, f64> {
    Kind::scalar(
        "a number such as 1.5",
        || json!({"type": ["number", "string"], "exclusiveMinimum": 0, "maximum": FACTOR_MAX, "pattern": "\\$\\{"}),
        |_, scalar| {
            let expected = || format!("expected a number above 0 such as 1.5, found {}", quote(&scalar.text));
            let (whole, part) = scalar.text.split_once('.').unwrap_or((&scalar.text, "0"));
            let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            if !digits(whole) || !digits(part) {
                return Err(expected());
            }
            let number: f64 = scalar.text.parse().map_err(|_| expected())?;
            if number > 0.0 && number <= FACTOR_MAX { Ok(number) } else { Err(expected()) }
        },
        |number| json!(number),
    )
}

fn confidence() -> Kind<'static, f64> {
    ratio().checked(|confidence| match (0.5..1.0).contains(confidence) {
        true => Ok(()),
        false => Err("a confidence is at least 50% and below 100%, where nothing would ever be certain".to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::config::Problem;
    use crate::config::read::{Context, Read};
    use crate::config::yaml;

    fn read(text: &str) -> (Option<Read<Rollout>>, Vec<String>, Vec<String>) {
        let mut context = Context::new(Path::new(""));
        let versions = ["stable".to_owned(), "canary".to_owned()];
        let node = yaml::parse(text).unwrap_or_else(|error| panic!("{}", error.message));
        let read = rollout(&versions).read(&mut context, &node, "rollout");
        let lines = |problems: &[Problem]| problems.iter().map(ToString::to_string).collect();
        (read, lines(&context.problems), lines(&context.warnings))
    }

    #[test]
    fn a_rollout_has_defaults_and_is_shown_as_a_file_of_the_same_meaning() {
        let text = "{from: stable, to: canary, steps: [{weight: 1%, hold: 10m}, {weight: 100%}]}";
        let (found, problems, warnings) = read(text);
        assert_eq!((problems, warnings), (Vec::new(), Vec::new()));
        let found = found.expect("read");
        let expected = Rollout {
            from: "stable".to_owned(),
            to: "canary".to_owned(),
            steps: vec![
                RolloutStep { share: 0.01, hold: Duration::from_secs(600) },
                RolloutStep { share: 1.0, hold: Duration::ZERO },
            ],
            judge: Judge {
                min_runs: 50,
                max_failed: Some(0.05),
                failed_ratio: Some(2.0),
                first_event_p95_ratio: Some(1.5),
                duration_p95_ratio: Some(1.5),
                confidence: 0.95,
            },
            on_bad: OnBad::Abort,
        };
        assert_eq!(found.value, expected);
        let again = read(&found.shown.to_string()).0.expect("read again");
        assert_eq!(again.value, expected);
        assert_eq!(again.shown, found.shown);
    }

    #[test]
    fn what_is_allowed_and_seldom_meant_is_warned_about() {
        let cases = [
            ("steps: [{weight: 50%}]", "rollout.steps[0].weight: this is the last step and below 100%"),
            ("steps: [{weight: 0%}, {weight: 100%}]", "rollout.steps[0].weight: at 0% no session starts"),
            ("steps: [{weight: 50%}, {weight: 20%}, {weight: 100%}]", "rollout.steps[1].weight: this is no more than"),
            ("steps: [{weight: 100%, hold: 1h}]", "rollout.steps[0].hold: at 100% no session starts at `from`"),
            (
                "steps: [{weight: 100%}], judge: {worse_than_from: {failed: 0.5}}",
                "rollout.judge.worse_than_from.failed: below 1 a version",
            ),
            (
                "steps: [{weight: 100%}], judge: {max_failed: null, worse_than_from: {failed: null, first_event_p95: null, duration_p95: null}}",
                "rollout.judge: nothing is looked at",
            ),
        ];
        for (case, expected) in cases {
            let (found, problems, warnings) = read(&format!("{{from: stable, to: canary, {case}}}"));
            assert!(found.is_some() && problems.is_empty(), "{case}: {problems:?}");
            assert_eq!(warnings.len(), 1, "{case}: {warnings:?}");
            assert!(warnings[0].contains(expected), "{case}: {warnings:?}");
        }
    }

    #[test]
    fn a_shadow_names_its_version_and_share() {
        let versions = ["stable".to_owned(), "canary".to_owned()];
        let mut context = Context::new(Path::new(""));
        let node = yaml::parse("{version: canary, percent: 2.5%}").expect("yaml");
        let found = shadow(&versions).read(&mut context, &node, "").expect("read");
        assert_eq!(found.value, Shadow { version: "canary".to_owned(), share: 0.025 });
    }
}
