//! What the comparison found: values of all rounds, medians with their spread, ratios to the floor, tables and plots.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::plot::{Bar, bars, escape, page, short};

/// Everything that the rounds gave.
#[derive(Debug, Default, Deserialize, Serialize)]
pub struct Outcome {
    pub machine: String,
    pub versions: BTreeMap<String, String>,
    /// In the order of work.
    pub items: Vec<ItemOutcome>,
    pub notes: Vec<String>,
}

/// One work item.
#[derive(Debug, Default, Deserialize, Serialize)]
pub struct ItemOutcome {
    pub title: String,
    /// Names of the figures, the headline first.
    pub figures: Vec<String>,
    pub contestants: Vec<Contestant>,
}

/// One proxy (or simulation) in one work item.
#[derive(Debug, Default, Deserialize, Serialize)]
pub struct Contestant {
    pub name: String,
    /// By figure: the value of each round, in order; rounds that failed have none.
    pub values: BTreeMap<String, Vec<(u32, f64)>>,
    /// Over all rounds.
    pub faults: u64,
    pub failures: Vec<String>,
}

/// The name of the contestant that ratios refer to.
pub const REFERENCE: &str = "floor";

impl Outcome {
    /// Adds a value of one round; without a value the figure still gets its column.
    pub fn add(&mut self, title: &str, contestant: &str, round: u32, figure: &str, value: impl Into<Option<f64>>) {
        let item = self.item(title);
        if !item.figures.iter().any(|name| name == figure) {
            item.figures.push(figure.to_owned());
        }
        if let Some(value) = value.into() {
            item.contestant(contestant).values.entry(figure.to_owned()).or_default().push((round, value));
        }
    }

    /// Adds a figure: `figure` of each contestant less what `base` gives for the same round and contestant.
    pub fn add_difference(
        &mut self,
        title: &str,
        figure: &str,
        name: &str,
        base: impl Fn(&Self, &str, u32) -> Option<f64>,
    ) {
        let found: Vec<(String, u32, f64)> = self
            .items
            .iter()
            .filter(|item| item.title == title)
            .flat_map(|item| &item.contestants)
            .flat_map(|one| {
                let values = one.values.get(figure).into_iter().flatten();
                values.map(|(round, value)| (one.name.clone(), *round, *value))
            })
            .collect();
        for (contestant, round, value) in found {
            if let Some(base) = base(self, &contestant, round) {
                self.add(title, &contestant, round, name, value - base);
            }
        }
    }

    /// One value of one round.
    pub fn value(&self, title: &str, contestant: &str, figure: &str, round: u32) -> Option<f64> {
        let item = self.items.iter().find(|item| item.title == title)?;
        let contestant = item.contestants.iter().find(|one| one.name == contestant)?;
        contestant.values.get(figure)?.iter().find(|(other, _)| *other == round).map(|(_, value)| *value)
    }

    pub fn add_faults(&mut self, title: &str, contestant: &str, faults: u64) {
        self.item(title).contestant(contestant).faults += faults;
    }

    pub fn add_failure(&mut self, title: &str, contestant: &str, failure: String) {
        self.item(title).contestant(contestant).failures.push(failure);
    }

    fn item(&mut self, title: &str) -> &mut ItemOutcome {
        let at = self.items.iter().position(|item| item.title == title).unwrap_or_else(|| {
            self.items.push(ItemOutcome { title: title.to_owned(), ..ItemOutcome::default() });
            self.items.len() - 1
        });
        &mut self.items[at]
    }

    /// The tables as text.
    pub fn table(&self) -> String {
        let mut text = format!("{}\n", self.machine);
        for (name, version) in &self.versions {
            let _ = writeln!(text, "  {name:<10} {version}");
        }
        for item in &self.items {
            let _ = write!(text, "\n{}\n{:<18}", item.title, "median [min..max]");
            for figure in &item.figures {
                let _ = write!(text, " {figure:>21}");
            }
            let _ = writeln!(text, " {:>18} {:>7}", format!("x {REFERENCE}"), "faults");
            for contestant in &item.contestants {
                let _ = write!(text, "{:<18}", contestant.name);
                for figure in &item.figures {
                    let _ =
                        write!(text, " {:>21}", contestant.summary(figure).map_or("-".to_owned(), |s| s.to_string()));
                }
                let ratio = item.ratio(contestant).map_or("-".to_owned(), |ratio| ratio.to_string());
                let _ = writeln!(text, " {ratio:>18} {:>7}", contestant.faults);
            }
            for contestant in &item.contestants {
                for failure in &contestant.failures {
                    let _ = writeln!(text, "  {}: {failure}", contestant.name);
                }
            }
        }
        for note in &self.notes {
            let _ = writeln!(text, "\n{note}");
        }
        text
    }

    /// The tables and a plot of every figure, as a page that needs nothing else.
    pub fn page(&self) -> String {
        let mut body = format!("<pre>{}</pre>", escape(&self.table()));
        for item in &self.items {
            let _ = write!(body, "<h2>{}</h2>", escape(&item.title));
            for figure in &item.figures {
                let found: Vec<(&str, Summary)> = item
                    .contestants
                    .iter()
                    .filter_map(|contestant| Some((contestant.name.as_str(), contestant.summary(figure)?)))
                    .collect();
                let drawn: Vec<Bar<'_>> = found
                    .iter()
                    .map(|(name, summary)| Bar { name, value: summary.median, low: summary.low, high: summary.high })
                    .collect();
                body += &bars(figure, "median, whisker: all rounds", &drawn);
            }
        }
        page("Proxies before agents, side by side", &body)
    }
}

impl ItemOutcome {
    fn contestant(&mut self, name: &str) -> &mut Contestant {
        let at = self.contestants.iter().position(|contestant| contestant.name == name).unwrap_or_else(|| {
            self.contestants.push(Contestant { name: name.to_owned(), ..Contestant::default() });
            self.contestants.len() - 1
        });
        &mut self.contestants[at]
    }

    /// Of the headline figure, to the reference in the same round.
    fn ratio(&self, contestant: &Contestant) -> Option<Summary> {
        let headline = self.figures.first()?;
        let reference =
            self.contestants.iter().find(|contestant| contestant.name == REFERENCE)?.values.get(headline)?;
        let ratios: Vec<f64> = contestant
            .values
            .get(headline)?
            .iter()
            .filter_map(|(round, value)| {
                let (_, base) = reference.iter().find(|(other, _)| other == round)?;
                (*base > 0.0).then(|| value / base)
            })
            .collect();
        summarize(&ratios)
    }
}

impl Contestant {
    fn summary(&self, figure: &str) -> Option<Summary> {
        let values: Vec<f64> = self.values.get(figure)?.iter().map(|(_, value)| *value).collect();
        summarize(&values)
    }
}

/// A median and from where to where the rounds lay.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Summary {
    median: f64,
    low: f64,
    high: f64,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} [{}..{}]", short(self.median), short(self.low), short(self.high))
    }
}

fn summarize(values: &[f64]) -> Option<Summary> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (*sorted.first()?, *sorted.last()?);
    let middle = sorted.len() / 2;
    let median = if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
    Some(Summary { median, low, high })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spreads() {
        assert_eq!(summarize(&[]), None);
        assert_eq!(summarize(&[3.0, 1.0, 2.0]), Some(Summary { median: 2.0, low: 1.0, high: 3.0 }));
        assert_eq!(summarize(&[4.0, 1.0]).unwrap().median, 2.5);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let mut outcome = Outcome::default();
        // The machine was twice as slow in round 2, and round 3 has no floor.
        for (round, floor, proxy) in [(1, Some(10.0), 12.0), (2, Some(20.0), 22.0), (3, None, 99.0)] {
            if let Some(floor) = floor {
                outcome.add("b", REFERENCE, round, "CPU", floor);
            }
            outcome.add("b", "proxy", round, "CPU", proxy);
        }
        let ratio = outcome.items[0].ratio(&outcome.items[0].contestants[1]).unwrap();
        assert!((ratio.low - 1.1).abs() < 1e-9 && (ratio.high - 1.2).abs() < 1e-9, "{ratio:?}");
        let table = outcome.table();
        assert!(table.contains("1.15 [1.10..1.20]"), "{table}");
        assert!(outcome.page().contains("<svg"));

        outcome
            .add_difference("b", "CPU", "added CPU", |outcome, _, round| outcome.value("b", REFERENCE, "CPU", round));
        assert_eq!(outcome.value("b", "proxy", "added CPU", 2), Some(2.0));
        assert_eq!(outcome.value("b", "proxy", "added CPU", 3), None);
    }
}
