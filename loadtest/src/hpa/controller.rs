//! The algorithm of Kubernetes' HorizontalPodAutoscaler (autoscaling/v2), as its controller does it: from a metric to a
//! recommendation, stabilised over windows, held to policies. Pure: the time is an argument, in seconds.

/// Within this part of the target nothing is changed (--horizontal-pod-autoscaler-tolerance).
pub const TOLERANCE: f64 = 0.1;
/// How often the controller looks, in seconds (--horizontal-pod-autoscaler-sync-period).
pub const SYNC_PERIOD: u32 = 15;

/// `behavior.scaleUp` or `behavior.scaleDown`.
#[derive(Clone, Debug)]
pub struct Rules {
    /// In seconds: scaling down follows the highest recommendation of that time, scaling up the lowest.
    pub stabilization: u32,
    /// The one that allows most wins (`selectPolicy: Max`).
    pub policies: Vec<Policy>,
}

#[derive(Clone, Copy, Debug)]
pub enum Policy {
    /// So many pods within so many seconds.
    Pods(u32, u32),
    /// So many percent within so many seconds.
    Percent(u32, u32),
}

/// `behavior`.
#[derive(Clone, Debug)]
pub struct Behavior {
    pub up: Rules,
    pub down: Rules,
}

impl Behavior {
    /// What Kubernetes does where nothing is said.
    pub fn default_of_kubernetes() -> Self {
        let all_at_once = vec![Policy::Percent(100, 15)];
        Self {
            up: Rules { stabilization: 0, policies: vec![Policy::Percent(100, 15), Policy::Pods(4, 15)] },
            down: Rules { stabilization: 300, policies: all_at_once },
        }
    }

    /// What docs/hpa.md recommends and the chart sets: up at once, down slowly.
    pub fn recommended() -> Self {
        let default = Self::default_of_kubernetes();
        let down = Rules { stabilization: 900, policies: vec![Policy::Percent(10, 60), Policy::Pods(1, 60)] };
        Self { down, ..default }
    }
}

/// One autoscaler, with what it remembers.
pub struct Controller {
    min: u32,
    max: u32,
    behavior: Behavior,
    /// (time, replicas)
    recommendations: Vec<(u32, u32)>,
    /// (time, pods more)
    ups: Vec<(u32, u32)>,
    /// (time, pods less)
    downs: Vec<(u32, u32)>,
}

impl Controller {
    pub fn new(min: u32, max: u32, behavior: Behavior) -> Self {
        Self { min, max, behavior, recommendations: Vec::new(), ups: Vec::new(), downs: Vec::new() }
    }

    /// How many replicas there should be from now on, given how many there are and what the metric asks for.
    pub fn decide(&mut self, now: u32, current: u32, recommended: u32) -> u32 {
        let stable = self.stabilized(now, current, recommended);
        let decided = if stable > current {
            let limit = self.up_limit(now, current).max(current);
            stable.min(limit).min(self.max)
        } else if stable < current {
            stable.max(self.down_limit(now, current).min(current)).max(self.min)
        } else {
            stable.clamp(self.min, self.max)
        };
        match decided {
            more if more > current => self.ups.push((now, more - current)),
            less if less < current => self.downs.push((now, current - less)),
            _ => {}
        }
        decided
    }

    fn stabilized(&mut self, now: u32, current: u32, recommended: u32) -> u32 {
        let (mut low, mut high) = (recommended, recommended);
        for &(at, replicas) in &self.recommendations {
            if now - at < self.behavior.up.stabilization {
                low = low.min(replicas);
            }
            if now - at < self.behavior.down.stabilization {
                high = high.max(replicas);
            }
        }
        let longest = self.behavior.up.stabilization.max(self.behavior.down.stabilization);
        self.recommendations.retain(|&(at, _)| now - at < longest);
        self.recommendations.push((now, recommended));
        current.max(low).min(high.max(low))
    }

    fn up_limit(&self, now: u32, current: u32) -> u32 {
        let limit = |policy: &Policy| {
            let (Policy::Pods(_, period) | Policy::Percent(_, period)) = *policy;
            let start = current - within(&self.ups, now, period).min(current) + within(&self.downs, now, period);
            match *policy {
                Policy::Pods(pods, _) => start + pods,
                Policy::Percent(percent, _) => (f64::from(start) * (1.0 + f64::from(percent) / 100.0)).ceil() as u32,
            }
        };
        self.behavior.up.policies.iter().map(limit).max().unwrap_or(u32::MAX)
    }

    fn down_limit(&self, now: u32, current: u32) -> u32 {
        let limit = |policy: &Policy| {
            let (Policy::Pods(_, period) | Policy::Percent(_, period)) = *policy;
            let start = (current + within(&self.downs, now, period)).saturating_sub(within(&self.ups, now, period));
            match *policy {
                Policy::Pods(pods, _) => start.saturating_sub(pods),
                Policy::Percent(percent, _) => (f64::from(start) * (1.0 - f64::from(percent) / 100.0)) as u32,
            }
        };
        self.behavior.down.policies.iter().map(limit).min().unwrap_or(0)
    }
}

fn within(events: &[(u32, u32)], now: u32, period: u32) -> u32 {
    events.iter().filter(|(at, _)| now - at < period).map(|(_, pods)| pods).sum()
}

/// An external metric with `AverageValue`: the whole divided by the target of one pod.
pub fn from_total(total: f64, target: f64, replicas: u32) -> u32 {
    let ratio = total / (target * f64::from(replicas));
    if (ratio - 1.0).abs() <= TOLERANCE { replicas } else { (total / target).ceil() as u32 }
}

/// A resource metric: the use of the pods that are ready and known, and how many are there that are not (they are new).
pub fn from_pods(uses: &[f64], target: f64, unready: u32, replicas: u32) -> u32 {
    if uses.is_empty() {
        return replicas;
    }
    let ratio_over = |count: f64| uses.iter().sum::<f64>() / (count * target);
    let ratio = ratio_over(uses.len() as f64);
    if unready == 0 || ratio <= 1.0 {
        if (ratio - 1.0).abs() <= TOLERANCE {
            return replicas;
        }
        return (ratio * uses.len() as f64).ceil() as u32;
    }
    // Pods that are not ready yet will take their part: counted as idle, lest they be asked for twice.
    let count = uses.len() as f64 + f64::from(unready);
    let ratio = ratio_over(count);
    if (ratio - 1.0).abs() <= TOLERANCE || ratio < 1.0 {
        return replicas;
    }
    ((ratio * count).ceil() as u32).max(replicas)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recommended(min: u32, max: u32) -> Controller {
        Controller::new(min, max, Behavior::recommended())
    }

    /// The table of docs/hpa.md, with a target of 7 runs for each pod.
    #[test]
    fn the_numbers_of_the_document() {
        for (demand, replicas, expected) in [
            (45.0, 4, 7),
            (30.0, 4, 4),
            (30.7, 4, 4),
            (31.0, 4, 5),
            (25.2, 4, 4),
            (25.0, 4, 4),
            (20.0, 4, 3),
            (0.0, 4, 0),
        ] {
            assert_eq!(from_total(demand, 7.0, replicas), expected, "{demand} runs at {replicas} pods");
        }
    }

    #[test]
    fn up_goes_at_once_and_by_doubling_or_four() {
        let mut controller = recommended(2, 40);
        assert_eq!(controller.decide(0, 2, 30), 6, "four more");
        assert_eq!(controller.decide(15, 6, 30), 12, "twice as many");
        assert_eq!(controller.decide(30, 12, 30), 24);
        assert_eq!(controller.decide(45, 24, 30), 30);
    }

    #[test]
    fn down_waits_for_the_window_and_then_goes_in_steps() {
        let mut controller = recommended(2, 40);
        let mut replicas = 20;
        let mut moves = Vec::new();
        replicas = controller.decide(0, replicas, 20);
        for now in (15..=1500).step_by(15) {
            let next = controller.decide(now, replicas, 4);
            if next != replicas {
                moves.push((now, next));
            }
            replicas = next;
        }
        assert_eq!(moves[0], (900, 18), "the recommendation of 20 is a quarter of an hour old");
        assert!(moves.windows(2).all(|pair| pair[1].0 - pair[0].0 == 60), "{moves:?}");
    }

    #[test]
    fn a_short_dip_changes_nothing() {
        let mut controller = recommended(2, 40);
        for now in (0..3600).step_by(15) {
            // Fourteen minutes low, one sync high.
            let wanted = if now % 840 == 0 { 10 } else { 5 };
            assert_eq!(controller.decide(now, 10, wanted), 10, "at {now} s");
        }
    }

    #[test]
    fn replicas_stay_between_least_and_most() {
        let mut controller = recommended(2, 10);
        assert_eq!(controller.decide(0, 9, 100), 10);
        let mut controller = recommended(2, 10);
        assert_eq!(controller.decide(0, 3, 0), 2);
    }

    #[test]
    fn pods_that_are_not_ready_hold_a_recommendation_back() {
        assert_eq!(from_pods(&[0.8, 0.8], 0.4, 0, 2), 4);
        assert_eq!(from_pods(&[0.8, 0.8], 0.4, 2, 4), 4, "two are on their way");
        assert_eq!(from_pods(&[0.2, 0.2], 0.4, 0, 2), 1);
        assert_eq!(from_pods(&[], 0.4, 2, 2), 2, "nothing is known");
    }
}
