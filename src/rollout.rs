//! Rollout: new sessions move from one version to another in steps, as long as the new one is not worse.
//!
//! Pure: what happened and the time go in, shares and transitions come out. A [`Rollout`] is one service's; it is kept as
//! long as the configuration has its block, and its state, completed and aborted too, decides the weights of `from` and `to`.
//!
//! ```text
//!            load, edit                     hold over, enough runs, not bad; promote
//! (nothing) ------------> pending --start--> step 1 --> step 2 .. --> completed
//!                                            |    ^                      |
//!                        pause, bad (pause)  v    | resume, promote      | abort: new sessions go back
//!                                           paused                       |
//!                        abort, bad (abort)  |                           v
//!                         from any of them   +------------------------> aborted --start--> step 1
//! ```

pub mod certainty;
pub mod history;
pub mod judge;
pub mod spread;

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod testing;

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::config;
use crate::config::OnBad;
pub use history::{Cause, History, Place, Transition};
pub use judge::{Ending, Evidence, Summary};

/// Effective weights are in such parts of a configured weight, so that a share of any two weights is exact.
pub const WEIGHT_UNIT: u64 = 1_000_000;

/// A point in time: milliseconds since the Unix epoch, by a clock that never jumps while the process lives (the wall clock
/// at its start and the monotonic clock since). It means the same after a restart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Moment(pub u64);

impl Moment {
    pub fn of(time: SystemTime) -> Moment {
        Moment(time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64))
    }
}

/// The rollout of one service. Serialised whole where state is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    plan: config::Rollout,
    state: State,
    /// Of the step that lasts; the last one's after the end.
    evidence: Evidence,
    history: History,
    /// The latest `now` that was seen: time never goes back, whatever a restart finds on the wall.
    clock: Moment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Pending,
    Running(Step),
    Paused { step: Step, by: Pauser },
    Completed,
    Aborted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Step {
    index: usize,
    /// Sessions born since then are judged.
    since: Moment,
    /// How long it was held until `resumed`.
    held: Duration,
    /// When the hold went on last.
    resumed: Moment,
}

/// Who paused a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pauser {
    Person,
    Judge,
}

/// What a person tells a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    Start,
    Promote,
    Pause,
    Resume,
    Abort,
}

/// Why a command was not followed: a sentence that says what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub &'static str);

/// One of the two versions of a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    From,
    To,
}

/// A run that ended.
#[derive(Clone, Copy, Debug)]
pub struct EndedRun {
    /// The version that it ran on; runs of other versions are not told.
    pub side: Side,
    pub ending: Ending,
    /// When its session began, or the run itself where it had none.
    pub born: Moment,
    /// From its start; `None`: it had none.
    pub first_event: Option<Duration>,
    pub duration: Duration,
}

/// A rollout as it stands, for the admin API.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report<'a> {
    #[serde(flatten)]
    pub place: Place,
    pub paused_by: Option<Pauser>,
    /// Completed or aborted, or the judge paused it: nothing more happens by itself.
    pub settled: bool,
    /// The rollout's configuration.
    pub from: &'a str,
    pub to: &'a str,
    pub steps: usize,
    /// Of the new sessions of both versions the part that starts at `to`.
    pub share: f64,
    /// When the step began, in milliseconds since the Unix epoch.
    pub since: Option<Moment>,
    /// How long the step lasted, and how long it must, in milliseconds.
    pub held_ms: Option<u64>,
    pub hold_ms: Option<u64>,
    /// Runs that each version needs in this step; `None`: it is not judged.
    pub min_runs: Option<u64>,
    pub evidence: Summary,
    pub history: &'a History,
}

impl Rollout {
    /// The rollout that a configuration asks for. `earlier` is that of the same service so far, from memory or a file: with
    /// the same block it goes on where it is. Any edit of the block's meaning starts it again; its history is kept.
    pub fn load(plan: &config::Rollout, earlier: Option<Rollout>, now: Moment) -> Rollout {
        let (history, clock, cause) = match earlier {
            Some(earlier) if earlier.plan == *plan => return earlier,
            Some(earlier) => (earlier.history, earlier.clock.max(now), Cause::Edited),
            None => (History::default(), now, Cause::Loaded),
        };
        let mut rollout =
            Rollout { plan: plan.clone(), state: State::Pending, evidence: Evidence::default(), history, clock };
        rollout.enter(0, cause);
        rollout.go_on();
        rollout
    }

    /// Follows a person's command. Whether that changed anything: a command that is already followed is followed again.
    pub fn command(&mut self, command: Command, now: Moment) -> Result<bool, Refused> {
        self.set_clock(now);
        let cause = Cause::Command(command);
        match (command, self.state) {
            (Command::Start, State::Pending | State::Aborted) => self.enter(0, cause),
            (Command::Start, _) => return Ok(false),
            (Command::Promote, State::Running(step) | State::Paused { step, .. }) => self.enter(step.index + 1, cause),
            (Command::Promote, State::Completed) => {
                return Err(Refused("the rollout is completed, so there is no further step"));
            }
            (Command::Pause, State::Running(step)) => {
                let step = Step { held: self.held_so_far(step), ..step };
                self.go_to(State::Paused { step, by: Pauser::Person }, cause);
            }
            (Command::Pause, State::Paused { .. }) => return Ok(false),
            (Command::Pause | Command::Resume, State::Completed) => {
                return Err(Refused("the rollout is completed, so there is nothing to pause or resume"));
            }
            (Command::Resume, State::Paused { step, by: Pauser::Person }) => {
                self.go_to(State::Running(Step { resumed: self.clock, ..step }), cause);
            }
            // A person looked at what the judge found bad; the same runs must not pause the rollout again.
            (Command::Resume, State::Paused { step, by: Pauser::Judge }) => self.enter(step.index, cause),
            (Command::Resume, State::Running(_)) => return Ok(false),
            (Command::Abort, State::Aborted) => return Ok(false),
            (Command::Abort, _) => self.go_to(State::Aborted, cause),
            (Command::Promote | Command::Pause | Command::Resume, State::Aborted) => {
                return Err(Refused("the rollout is aborted; `start` begins it again at its first step"));
            }
            (Command::Promote | Command::Pause | Command::Resume, State::Pending) => {
                return Err(Refused("the rollout has not begun; `start` begins it"));
            }
        }
        self.go_on();
        Ok(true)
    }

    /// Notes how a run ended, and acts on it at once. Whether the rollout is elsewhere now.
    pub fn observe(&mut self, run: EndedRun, now: Moment) -> bool {
        self.set_clock(now);
        let (State::Running(step) | State::Paused { step, .. }) = self.state else { return false };
        if run.born < step.since {
            return false;
        }
        let runs = match run.side {
            Side::From => &mut self.evidence.from,
            Side::To => &mut self.evidence.to,
        };
        runs.add(run.ending, run.first_event, run.duration);
        // In a small step there are a hundred runs of `from` for each of `to`; what they change is seen at the next one of
        // `to`, or at the next `advance`.
        run.side == Side::To && self.go_on()
    }

    /// Passes to the next step where the hold is over. To be called about every second. Whether the rollout is elsewhere now.
    pub fn advance(&mut self, now: Moment) -> bool {
        self.set_clock(now);
        self.go_on()
    }

    /// Of the new sessions of both versions the part that starts at `to`, in [`WEIGHT_UNIT`]s.
    pub fn share_parts(&self) -> u64 {
        let share = match self.state {
            State::Pending | State::Aborted => 0.0,
            State::Running(step) | State::Paused { step, .. } => self.plan.steps[step.index].share,
            State::Completed => self.plan.steps.last().map_or(1.0, |step| step.share),
        };
        (share * WEIGHT_UNIT as f64).round() as u64
    }

    /// Which of the two versions this is.
    pub fn side(&self, version: &str) -> Option<Side> {
        match version {
            _ if version == self.plan.from => Some(Side::From),
            _ if version == self.plan.to => Some(Side::To),
            _ => None,
        }
    }

    pub fn plan(&self) -> &config::Rollout {
        &self.plan
    }

    pub fn place(&self) -> Place {
        self.state.place()
    }

    pub fn history(&self) -> &History {
        &self.history
    }

    pub fn report(&self) -> Report<'_> {
        let step = self.state.step();
        let configured = step.map(|step| &self.plan.steps[step.index]);
        let milliseconds = |duration: Duration| duration.as_millis() as u64;
        let paused_by = match self.state {
            State::Paused { by, .. } => Some(by),
            _ => None,
        };
        let ended = matches!(self.state, State::Completed | State::Aborted);
        Report {
            place: self.place(),
            paused_by,
            settled: ended || paused_by == Some(Pauser::Judge),
            from: &self.plan.from,
            to: &self.plan.to,
            steps: self.plan.steps.len(),
            share: self.share_parts() as f64 / WEIGHT_UNIT as f64,
            since: step.map(|step| step.since),
            held_ms: step.map(|step| milliseconds(self.held_so_far(step))),
            hold_ms: configured.map(|step| milliseconds(step.hold)),
            min_runs: configured.filter(|step| is_compared(step)).map(|_| self.plan.judge.min_runs),
            evidence: self.summary(),
            history: &self.history,
        }
    }

    /// Every step that is due, one after the other; each ends this or has a hold or runs to wait for.
    fn go_on(&mut self) -> bool {
        let before = self.state;
        for _ in 0..=self.plan.steps.len() {
            let (State::Running(step) | State::Paused { step, by: Pauser::Person }) = self.state else { break };
            let configured = &self.plan.steps[step.index];
            let compared = is_compared(configured);
            if compared && self.evidence.is_bad(&self.plan.judge, self.share_of_error(step.index)) {
                // A pause by a person keeps the shares from growing; it is no protection from a version that is bad.
                let step = Step { held: self.held_so_far(step), ..step };
                match self.plan.on_bad {
                    OnBad::Abort => self.go_to(State::Aborted, Cause::Bad),
                    OnBad::Pause => self.go_to(State::Paused { step, by: Pauser::Judge }, Cause::Bad),
                }
                break;
            }
            let held = matches!(self.state, State::Running(_)) && self.held_so_far(step) >= configured.hold;
            let judge = &self.plan.judge;
            if !held || compared && (!self.evidence.is_enough(judge) || self.evidence.is_doubtful(judge)) {
                break;
            }
            self.enter(step.index + 1, Cause::HoldOver);
        }
        self.state != before
    }

    fn enter(&mut self, index: usize, cause: Cause) {
        if index >= self.plan.steps.len() {
            return self.go_to(State::Completed, cause);
        }
        let step = Step { index, since: self.clock, held: Duration::ZERO, resumed: self.clock };
        self.go_to(State::Running(step), cause);
        self.evidence = Evidence::default();
    }

    /// Changes the state and writes it down, with the evidence so far.
    fn go_to(&mut self, state: State, cause: Cause) {
        let evidence = self.state.step().map(|_| self.summary());
        self.history.add(Transition {
            number: 0,
            at: self.clock,
            before: self.place(),
            after: state.place(),
            cause,
            evidence,
        });
        self.state = state;
    }

    fn summary(&self) -> Summary {
        let index = self.state.step().map_or(0, |step| step.index);
        self.evidence.summary(&self.plan.judge, self.share_of_error(index))
    }

    /// The part of the judge's error that is for this step: the k-th that is judged has a k-th of what the first one has. So
    /// the first one, which has the fewest runs to judge by, depends little on how many steps there are.
    fn share_of_error(&self, index: usize) -> f64 {
        let steps = &self.plan.steps;
        let compared = |steps: &[config::RolloutStep]| steps.iter().filter(|step| is_compared(step)).count();
        let whole: f64 = (1..=compared(steps).max(1)).map(|rank| 1.0 / rank as f64).sum();
        1.0 / compared(&steps[..=index]).max(1) as f64 / whole
    }

    /// A pause doesn't count.
    fn held_so_far(&self, step: Step) -> Duration {
        match self.state {
            State::Running(_) => step.held + Duration::from_millis(self.clock.0.saturating_sub(step.resumed.0)),
            _ => step.held,
        }
    }

    fn set_clock(&mut self, now: Moment) {
        self.clock = self.clock.max(now);
    }
}

/// Whether sessions are born on both sides, so that there is something to compare.
fn is_compared(step: &config::RolloutStep) -> bool {
    step.share > 0.0 && step.share < 1.0
}

/// The weights that new sessions are dealt by, in [`WEIGHT_UNIT`]s: those of the configuration, but for `from` and `to` of
/// a rollout, which share what they have together. What another version has stays as it is.
pub fn effective_weights<'v>(
    rollout: Option<&Rollout>,
    versions: impl Iterator<Item = (&'v str, u32)> + Clone,
) -> Vec<u64> {
    let side = |name: &str| rollout.and_then(|rollout| rollout.side(name));
    let together: u64 =
        versions.clone().filter(|(name, _)| side(name).is_some()).map(|(_, weight)| u64::from(weight)).sum();
    let to = rollout.map_or(0, Rollout::share_parts);
    versions
        .map(|(name, weight)| match side(name) {
            Some(Side::To) => together * to,
            Some(Side::From) => together * (WEIGHT_UNIT - to),
            None => u64::from(weight) * WEIGHT_UNIT,
        })
        .collect()
}

impl State {
    fn step(self) -> Option<Step> {
        match self {
            State::Running(step) | State::Paused { step, .. } => Some(step),
            State::Pending | State::Completed | State::Aborted => None,
        }
    }

    fn place(self) -> Place {
        match self {
            State::Pending => Place::Pending,
            State::Running(step) => Place::Running { step: step.index + 1 },
            State::Paused { step, .. } => Place::Paused { step: step.index + 1 },
            State::Completed => Place::Completed,
            State::Aborted => Place::Aborted,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::{Judge, RolloutStep};

    const MINUTE: u64 = 60_000;

    fn plan() -> config::Rollout {
        testing::plan(&[(0.01, 600), (0.5, 1200), (1.0, 0)])
    }

    fn started() -> Rollout {
        Rollout::load(&plan(), None, Moment(0))
    }

    /// Ends so many runs on each side; those of `to` as `ending` says.
    fn end_runs(rollout: &mut Rollout, count: u64, ending: Ending, now: u64) -> bool {
        let second = Duration::from_secs(1);
        let run =
            |side, ending| EndedRun { side, ending, born: Moment(now), first_event: Some(second), duration: second };
        let mut moved = false;
        for _ in 0..count {
            moved |= rollout.observe(run(Side::From, Ending::Good), Moment(now));
            moved |= rollout.observe(run(Side::To, ending), Moment(now));
        }
        moved
    }

    fn weights(rollout: Option<&Rollout>, versions: &[(&str, u32)]) -> Vec<u64> {
        effective_weights(rollout, versions.iter().copied())
    }

    #[test]
    fn steps_pass_when_the_hold_is_over_and_there_are_enough_runs() {
        let mut rollout = started();
        assert_eq!(rollout.place(), Place::Running { step: 1 });
        assert!(!rollout.advance(Moment(11 * MINUTE)), "the hold is over, and there are no runs");
        assert!(!end_runs(&mut rollout, 49, Ending::Good, 11 * MINUTE));
        assert!(end_runs(&mut rollout, 1, Ending::Good, 11 * MINUTE));
        assert_eq!(rollout.place(), Place::Running { step: 2 });
        assert!(!end_runs(&mut rollout, 60, Ending::Good, 30 * MINUTE), "20 minutes are not over");
        assert!(rollout.advance(Moment(31 * MINUTE)));
        assert_eq!(rollout.place(), Place::Completed, "100 % has no hold and nothing to compare with");
        assert_eq!(rollout.report().share, 1.0);
        let lines: Vec<String> = rollout.history().iter().map(ToString::to_string).collect();
        assert_eq!(lines[0], "pending -> step 1: the configuration has a rollout");
        assert_eq!(lines[1], "step 1 -> step 2: the hold is over; `to` failed 0 of 50 runs, `from` 0 of 50");
        assert_eq!(lines[3], "step 3 -> completed: the hold is over; `to` failed 0 of 0 runs, `from` 0 of 0");
    }

    #[test]
    fn a_step_is_not_passed_while_there_are_signs_of_a_difference() {
        let mut rollout = started();
        end_runs(&mut rollout, 46, Ending::Good, MINUTE);
        assert!(!end_runs(&mut rollout, 4, Ending::Bad, MINUTE), "4 of 50 are not certain");
        assert!(!rollout.advance(Moment(60 * MINUTE)), "and not nothing");
        assert_eq!(rollout.place(), Place::Running { step: 1 });
        assert!(end_runs(&mut rollout, 200, Ending::Good, 60 * MINUTE), "4 of 250 are");
        assert_eq!(rollout.place(), Place::Running { step: 2 });
    }

    #[test]
    fn a_bad_version_is_aborted_and_the_history_says_why() {
        let mut rollout = started();
        assert!(end_runs(&mut rollout, 50, Ending::Bad, MINUTE));
        assert_eq!(rollout.place(), Place::Aborted);
        assert_eq!(rollout.share_parts(), 0);
        let last = rollout.history().last().expect("a transition");
        assert_eq!(last.cause, Cause::Bad);
        assert_eq!(last.evidence.as_ref().map(|evidence| (evidence.to.failed, evidence.from.failed)), Some((50, 0)));
        assert!(!end_runs(&mut rollout, 50, Ending::Good, MINUTE), "it stays aborted");
        assert_eq!(rollout.command(Command::Start, Moment(MINUTE)), Ok(true));
        assert_eq!(rollout.place(), Place::Running { step: 1 });
        assert!(!end_runs(&mut rollout, 40, Ending::Good, MINUTE), "the bad runs are forgotten");
    }

    #[test]
    fn a_pause_by_the_judge_ends_with_fresh_evidence() {
        let mut rollout = Rollout::load(&config::Rollout { on_bad: OnBad::Pause, ..plan() }, None, Moment(0));
        assert!(end_runs(&mut rollout, 50, Ending::Bad, MINUTE));
        assert_eq!(rollout.place(), Place::Paused { step: 1 });
        assert_eq!(rollout.report().share, 0.01);
        assert!(rollout.report().settled);
        assert!(!rollout.advance(Moment(60 * MINUTE)));
        assert_eq!(rollout.command(Command::Resume, Moment(60 * MINUTE)), Ok(true));
        assert_eq!(rollout.report().evidence.to.runs, 0);
        assert!(!rollout.advance(Moment(61 * MINUTE)));
        assert_eq!(rollout.place(), Place::Running { step: 1 });
    }

    #[test]
    fn a_pause_by_a_person_stops_the_hold_and_not_the_judge() {
        let mut rollout = started();
        end_runs(&mut rollout, 60, Ending::Good, MINUTE);
        assert_eq!(rollout.command(Command::Pause, Moment(9 * MINUTE)), Ok(true));
        assert_eq!(rollout.command(Command::Pause, Moment(9 * MINUTE)), Ok(false));
        assert!(!rollout.advance(Moment(60 * MINUTE)));
        assert_eq!(rollout.command(Command::Resume, Moment(60 * MINUTE)), Ok(true));
        assert!(!rollout.advance(Moment(60 * MINUTE + 59_999)));
        let mut other = rollout.clone();
        assert!(rollout.advance(Moment(61 * MINUTE)), "nine minutes before the pause, one after");
        assert_eq!(other.command(Command::Pause, Moment(61 * MINUTE - 1)), Ok(true));
        assert!(end_runs(&mut other, 60, Ending::Bad, 61 * MINUTE));
        assert_eq!(other.place(), Place::Aborted);
    }

    #[test]
    fn sessions_older_than_the_step_are_not_judged() {
        let mut rollout = started();
        assert_eq!(rollout.command(Command::Promote, Moment(5 * MINUTE)), Ok(true));
        let old = EndedRun {
            side: Side::To,
            ending: Ending::Bad,
            born: Moment(5 * MINUTE - 1),
            first_event: None,
            duration: Duration::from_secs(1),
        };
        rollout.observe(old, Moment(6 * MINUTE));
        assert_eq!(rollout.report().evidence.to.runs, 0);
        rollout.observe(EndedRun { born: Moment(5 * MINUTE), ..old }, Moment(6 * MINUTE));
        assert_eq!(rollout.report().evidence.to.runs, 1);
    }

    #[test]
    fn one_step_of_the_whole_switches_at_once_and_can_be_undone() {
        let blue_green = config::Rollout { steps: vec![RolloutStep { share: 1.0, hold: Duration::ZERO }], ..plan() };
        let mut rollout = Rollout::load(&blue_green, None, Moment(0));
        assert_eq!(rollout.place(), Place::Completed);
        let versions = [("stable", 95), ("canary", 5)];
        assert_eq!(weights(Some(&rollout), &versions), [0, 100 * WEIGHT_UNIT]);
        assert_eq!(rollout.command(Command::Start, Moment(1)), Ok(false), "start is idempotent");
        assert_eq!(rollout.command(Command::Abort, Moment(1)), Ok(true));
        assert_eq!(weights(Some(&rollout), &versions), [100 * WEIGHT_UNIT, 0]);
        assert_eq!(rollout.command(Command::Abort, Moment(1)), Ok(false));
        assert_eq!(rollout.command(Command::Start, Moment(1)), Ok(true));
        assert_eq!(rollout.place(), Place::Completed);
    }

    #[test]
    fn commands_that_mean_nothing_are_refused() {
        let mut rollout = started();
        for _ in 0..3 {
            assert_eq!(rollout.command(Command::Promote, Moment(0)), Ok(true));
            if rollout.place() == Place::Completed {
                break;
            }
        }
        assert_eq!(rollout.place(), Place::Completed);
        for command in [Command::Promote, Command::Pause, Command::Resume] {
            assert!(rollout.command(command, Moment(0)).is_err(), "{command:?} when completed");
        }
        assert_eq!(rollout.command(Command::Abort, Moment(0)), Ok(true));
        for command in [Command::Promote, Command::Pause, Command::Resume] {
            assert!(rollout.command(command, Moment(0)).is_err(), "{command:?} when aborted");
        }
    }

    #[test]
    fn an_unchanged_block_goes_on_and_an_edited_one_begins_again() {
        let mut rollout = started();
        assert_eq!(rollout.command(Command::Promote, Moment(MINUTE)), Ok(true));
        end_runs(&mut rollout, 10, Ending::Good, 2 * MINUTE);
        let kept = serde_json::to_string(&rollout).expect("serialises");
        let restored: Rollout = serde_json::from_str(&kept).expect("reads");
        assert_eq!(restored, rollout, "a restart loses nothing");
        let again = Rollout::load(&plan(), Some(restored.clone()), Moment(3 * MINUTE));
        assert_eq!(again, rollout);
        for edited in [
            config::Rollout { on_bad: OnBad::Pause, ..plan() },
            config::Rollout { judge: Judge { min_runs: 51, ..plan().judge }, ..plan() },
        ] {
            let again = Rollout::load(&edited, Some(restored.clone()), Moment(3 * MINUTE));
            assert_eq!(again.place(), Place::Running { step: 1 });
            assert_eq!(again.report().evidence.to.runs, 0);
            assert_eq!(again.history().last().map(|last| last.cause), Some(Cause::Edited));
            assert_eq!(again.history().iter().count(), 3);
        }
    }

    #[test]
    fn weights_of_the_file_apply_without_a_rollout() {
        let versions = [("stable", 95), ("canary", 5), ("other", 100)];
        assert_eq!(weights(None, &versions), [95 * WEIGHT_UNIT, 5 * WEIGHT_UNIT, 100 * WEIGHT_UNIT]);
        assert_eq!(weights(Some(&started()), &versions), [99 * WEIGHT_UNIT, WEIGHT_UNIT, 100 * WEIGHT_UNIT]);
        let odd = [("stable", 1), ("canary", 0)];
        assert_eq!(weights(Some(&started()), &odd), [990_000, 10_000], "a share of any weights is exact");
    }

    #[test]
    fn only_the_last_transitions_are_kept() {
        let mut rollout = started();
        for n in 0..100 {
            let command = if n % 2 == 0 { Command::Abort } else { Command::Start };
            assert_eq!(rollout.command(command, Moment(n)), Ok(true));
        }
        assert_eq!(rollout.history().iter().count(), history::TRANSITIONS_MAX);
        assert_eq!(rollout.history().last().map(|last| last.at), Some(Moment(99)));
    }

    #[test]
    fn a_report_is_one_flat_object() {
        let report = serde_json::to_value(started().report()).expect("serialises");
        assert_eq!(report["state"], "running");
        assert_eq!(report["step"], 1);
        assert_eq!(report["share"], 0.01);
        assert_eq!(report["min_runs"], 50);
        assert_eq!(report["history"][0]["before"]["state"], "pending");
        assert_eq!(report["evidence"]["comparisons"][1]["criterion"], "failed");
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Command(Command),
        Advance(u64),
        Runs(u64, bool),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let command = prop::sample::select(vec![
            Command::Start,
            Command::Promote,
            Command::Pause,
            Command::Resume,
            Command::Abort,
        ]);
        let event = prop_oneof![
            command.prop_map(Event::Command),
            (0..15_u64).prop_map(Event::Advance),
            (1..80_u64, any::<bool>()).prop_map(|(count, bad)| Event::Runs(count, bad)),
        ];
        prop::collection::vec(event, 0..40)
    }

    proptest! {
        /// Whatever happens: nobody's weight is lost, what a call says it changed it changed, each change is written down
        /// once and follows the one before, and a restart at any moment is not noticed.
        #[test]
        fn whatever_happens_weights_and_history_add_up(events in events(), pause in any::<bool>()) {
            let on_bad = if pause { OnBad::Pause } else { OnBad::Abort };
            let plan = config::Rollout { on_bad, ..plan() };
            let mut rollout = Rollout::load(&plan, None, Moment(0));
            let mut now = 0;
            for event in events {
                let before = rollout.clone();
                let changed = match event {
                    Event::Command(command) => rollout.command(command, Moment(now)).unwrap_or(false),
                    Event::Advance(minutes) => {
                        now += minutes * MINUTE;
                        rollout.advance(Moment(now))
                    }
                    Event::Runs(count, bad) => {
                        end_runs(&mut rollout, count, if bad { Ending::Bad } else { Ending::Good }, now)
                    }
                };
                prop_assert_eq!(changed, before.history != rollout.history);
                let weights = weights(Some(&rollout), &[("stable", 7), ("other", 3), ("canary", 2)]);
                prop_assert_eq!(weights[0] + weights[2], 9 * WEIGHT_UNIT);
                prop_assert_eq!(weights[1], 3 * WEIGHT_UNIT);
                let transitions: Vec<&Transition> = rollout.history().iter().collect();
                for pair in transitions.windows(2) {
                    prop_assert_eq!(pair[0].after, pair[1].before);
                    prop_assert!(pair[0].at <= pair[1].at);
                }
                prop_assert_eq!(transitions.last().map(|last| last.after), Some(rollout.place()));
                let kept = serde_json::to_string(&rollout).expect("serialises");
                rollout = Rollout::load(&plan, Some(serde_json::from_str(&kept).expect("reads")), Moment(now));
            }
        }
    }
}
