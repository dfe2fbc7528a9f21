//! Tests of the queue: against a model that does everything by looking at everybody.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Push { class: u8, principal: u8, session: Option<u64>, place: Place, wait: u64 },
    Leave(usize),
    Offer { endpoint: u32, version: usize, slot: bool, open: bool, common: bool },
    Sort(usize, Place),
    Pass(u64),
    Max(usize),
}

fn places() -> impl Strategy<Value = Place> {
    prop_oneof![
        (0..3_u32).prop_map(Place::Endpoint),
        (0..2_usize).prop_map(Place::Version),
        Just(Place::Any),
        Just(Place::Ready),
        Just(Place::Nowhere),
        Just(Place::Turn),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..4_u8, 0..3_u8, proptest::option::of(0..4_u64), places(), 1..50_u64)
            .prop_map(|(class, principal, session, place, wait)| Step::Push { class, principal, session, place, wait }),
        2 => (0..40_usize).prop_map(Step::Leave),
        6 => (0..3_u32, any::<bool>(), proptest::bool::weighted(0.8), proptest::bool::weighted(0.8)).prop_map(
            |(endpoint, slot, open, common)| Step::Offer {
                endpoint,
                version: (endpoint % 2) as usize,
                slot,
                open,
                common,
            },
        ),
        2 => ((0..40_usize), places()).prop_map(|(which, place)| Step::Sort(which, place)),
        1 => (1..20_u64).prop_map(Step::Pass),
        1 => (0..30_usize).prop_map(Step::Max),
    ]
}

fn crowded() -> impl Strategy<Value = Step> {
    let rare = steps().prop_filter("nobody comes or goes by it", |step| matches!(step, Step::Sort(..)));
    let push = (0..8_u8, 0..3_u8, places()).prop_map(|(class, principal, place)| Step::Push {
        class,
        principal,
        session: None,
        place,
        wait: 1_000,
    });
    let offer =
        (0..3_u32).prop_map(|endpoint| Step::Offer { endpoint, version: 0, slot: true, open: true, common: true });
    prop_oneof![12 => push, 9 => offer, 1 => rare]
}

/// Everybody in one list, in order of arrival.
#[derive(Default)]
struct Model {
    waiting: Vec<One>,
    max: usize,
    /// (class, principal), when it had its last turn.
    turns: Vec<((u8, u8), u64)>,
    /// (place, class), how often it was passed over, when it had its last turn.
    rows: Vec<((Place, u8), (u32, u64))>,
    stamp: u64,
}

#[derive(Clone, Debug)]
struct One {
    ticket: Ticket,
    class: u8,
    principal: u8,
    session: Option<u64>,
    place: Place,
    deadline: u64,
}

fn slot_place(place: Place) -> bool {
    !matches!(place, Place::Ready | Place::Nowhere | Place::Turn)
}

impl Model {
    fn turn(&self, one: &One) -> u64 {
        self.turns.iter().find(|(flow, _)| *flow == (one.class, one.principal)).expect("it waits").1
    }

    fn row(&self, one: &One) -> (u32, u64) {
        self.rows.iter().find(|(row, _)| *row == (one.place, one.class)).expect("it waits").1
    }

    /// Rows and turns are of those who wait; a new one begins now.
    fn tidy(&mut self) {
        let waiting = &self.waiting;
        self.rows.retain(|((place, class), _)| waiting.iter().any(|one| one.place == *place && one.class == *class));
        self.turns.retain(|(flow, _)| waiting.iter().any(|one| (one.class, one.principal) == *flow));
        for one in &self.waiting {
            if !self.turns.iter().any(|(flow, _)| *flow == (one.class, one.principal)) {
                self.stamp += 1;
                self.turns.push(((one.class, one.principal), self.stamp));
            }
            if !self.rows.iter().any(|(row, _)| *row == (one.place, one.class)) {
                self.rows.push(((one.place, one.class), (0, self.stamp)));
            }
        }
    }

    fn can_use(one: &One, offer: Offer) -> bool {
        match one.place {
            Place::Endpoint(endpoint) => offer.slot && endpoint == offer.endpoint,
            Place::Version(version) => offer.slot && offer.open && version == offer.version,
            Place::Any => offer.slot && offer.open && offer.common,
            Place::Ready => offer.open,
            Place::Nowhere | Place::Turn => false,
        }
    }

    fn first(&self, offer: Offer) -> Option<One> {
        let able = || self.waiting.iter().filter(|one| Model::can_use(one, offer));
        let due = |class| {
            let rows = able().filter(|one| one.class == class).map(|one| self.row(one));
            rows.filter(|(passed, _)| *passed >= PASSED_MAX).map(|(_, turn)| turn).min()
        };
        let order = |one: &&One| (due(one.class).unwrap_or(u64::MAX), one.class, self.turn(one), one.ticket);
        able().min_by_key(order).cloned()
    }

    fn take(&mut self, taken: &One, offer: Offer) {
        self.stamp += 1;
        self.waiting.retain(|one| one.ticket != taken.ticket);
        for ((place, class), (passed, turn)) in &mut self.rows {
            let probe = One { place: *place, ..taken.clone() };
            if Model::can_use(&probe, offer) && *class == taken.class {
                (*passed, *turn) = (0, self.stamp);
            } else if Model::can_use(&probe, offer) {
                *passed += 1;
            }
        }
        for (flow, turn) in &mut self.turns {
            if *flow == (taken.class, taken.principal) {
                *turn = self.stamp;
            }
        }
        self.tidy();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn it_does_what_a_list_of_everybody_would(steps in proptest::collection::vec(steps(), 1..120)) {
        compare(steps, 20)?;
    }

    /// Whatever the mix of endpoints, classes and arrivals: the next of a class waits for so many others, and no more.
    #[test]
    fn nobody_starves(
        steps in proptest::collection::vec((0..8_u8, places(), 0..20_u32), 1..150),
        class in 1..8_u8,
    ) {
        let now = crate::ids::now();
        let mut queue = Queue::new(usize::MAX);
        let patient = queue.push(arrival(class, 0, Place::Endpoint(0)), now).expect("there is room");
        let mut overtaken = 0;
        for (other, place, elsewhere) in steps {
            // Of all classes somebody waits everywhere, and other endpoints may be much faster than this one.
            for endpoint in std::iter::repeat_n(1, elsewhere as usize).chain([0]) {
                for (class, place) in [(0, Place::Any), (0, Place::Endpoint(0)), (7, Place::Any), (other, place)] {
                    queue.push(arrival(class, 1, place), now).expect("there is room");
                }
                let next = queue.first(offer(endpoint)).expect("somebody waits");
                let of_class = queue.waiting[&next].flow.class;
                queue.take(next, offer(endpoint));
                if next == patient {
                    return Ok(());
                }
                overtaken += u32::from(endpoint == 0 && of_class != Class(class));
                prop_assert!(overtaken <= OVERTAKEN_MAX);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The same in a crowd of all classes, where the less urgent come to be due.
    #[test]
    fn it_does_so_in_a_crowd(steps in proptest::collection::vec(crowded(), 150..400)) {
        compare(steps, 400)?;
    }
}

/// A class that other endpoints pass over much more often is due each time this one looks, and still goes first once
/// only.
#[test]
fn the_overdue_take_turns() {
    let now = crate::ids::now();
    let mut queue = Queue::new(usize::MAX);
    let patient = queue.push(arrival(5, 0, Place::Endpoint(0)), now).expect("there is room");
    for overtaken in 0..=OVERTAKEN_MAX {
        // Just so often that the least urgent are due when this one looks.
        for _ in 0..PASSED_MAX {
            queue.push(arrival(0, 1, Place::Any), now).expect("there is room");
            queue.push(arrival(7, 2, Place::Any), now).expect("there is room");
            let next = queue.first(offer(1)).expect("somebody waits");
            queue.take(next, offer(1));
        }
        let next = queue.first(offer(0)).expect("somebody waits");
        queue.take(next, offer(0));
        if next == patient {
            assert!(overtaken >= PASSED_MAX, "more urgent ones go first");
            return;
        }
        assert!(overtaken < OVERTAKEN_MAX, "it starves");
    }
}

fn compare(steps: Vec<Step>, max: usize) -> Result<(), TestCaseError> {
    let start = crate::ids::now();
    let at = |time: u64| start + Duration::from_millis(time);
    let mut now = 0;
    let mut queue: Queue<u64> = Queue::new(max);
    let mut model = Model { max, ..Model::default() };
    let mut arrivals = 0;
    for step in steps {
        match step {
            Step::Push { class, principal, session, place, wait } => {
                arrivals += 1;
                let arrival = Arrival {
                    class: Class(class),
                    principal: (principal > 0).then_some([principal; 16]),
                    session,
                    place,
                    deadline: at(now + wait),
                    beyond_max: wait == 7,
                    waiter: arrivals,
                };
                let pushed = queue.push(arrival, at(now));
                prop_assert_eq!(pushed.is_ok(), model.waiting.len() < model.max || wait == 7);
                if let Ok(ticket) = pushed {
                    let mut one = One { ticket, class, principal, session, place, deadline: now + wait };
                    let mut others = model.waiting.iter().filter(|other| session.is_some() && other.session == session);
                    if let Some(other) = others.clone().next() {
                        (one.class, one.principal) = (other.class, other.principal);
                    }
                    if slot_place(place)
                        && let Some(other) = others.find(|other| slot_place(other.place))
                    {
                        one.place = other.place;
                    }
                    model.waiting.push(one);
                    model.tidy();
                }
            }
            Step::Leave(which) => {
                if !model.waiting.is_empty() {
                    let one = model.waiting.remove(which % model.waiting.len());
                    prop_assert!(queue.leave(one.ticket).is_some());
                    prop_assert!(queue.leave(one.ticket).is_none());
                    model.tidy();
                }
            }
            Step::Offer { endpoint, version, slot, open, common } => {
                let offer = Offer { endpoint, version, slot, open, common };
                let expected = model.first(offer);
                let first = queue.first(offer);
                prop_assert_eq!(first, expected.as_ref().map(|one| one.ticket));
                if let Some(one) = expected {
                    prop_assert!(queue.take(one.ticket, offer).is_some());
                    model.take(&one, offer);
                }
            }
            Step::Sort(which, to) => {
                if !model.waiting.is_empty() {
                    let index = which % model.waiting.len();
                    let One { ticket, session, .. } = model.waiting[index];
                    queue.sort(ticket, to);
                    for one in &mut model.waiting {
                        let same = session.is_some() && one.session == session;
                        if one.ticket == ticket || (same && slot_place(to) && slot_place(one.place)) {
                            one.place = to;
                        }
                    }
                    model.tidy();
                }
            }
            Step::Pass(time) => {
                now += time;
                let mut due: Vec<One> = model.waiting.iter().filter(|one| one.deadline <= now).cloned().collect();
                due.sort_by_key(|one| (one.deadline, one.ticket));
                let expired: Vec<Ticket> =
                    queue.expire(at(now), usize::MAX).into_iter().map(|(ticket, _)| ticket).collect();
                prop_assert_eq!(expired, due.iter().map(|one| one.ticket).collect::<Vec<_>>());
                model.waiting.retain(|one| one.deadline > now);
                model.tidy();
            }
            Step::Max(max) => {
                queue.set_max(max);
                model.max = max;
            }
        }
        prop_assert_eq!(queue.len(), model.waiting.len());
        let placeable = |one: &&One| !matches!(one.place, Place::Endpoint(_) | Place::Turn);
        prop_assert_eq!(queue.placeable(), model.waiting.iter().filter(placeable).count());
        for (index, one) in model.waiting.iter().enumerate() {
            prop_assert_eq!(queue.position(one.ticket), Some(index + 1));
            prop_assert_eq!(queue.place(one.ticket), Some(one.place));
        }
        let waiting_for = |wanted: Place| -> Vec<Ticket> {
            model.waiting.iter().filter(|one| one.place == wanted).map(|one| one.ticket).collect()
        };
        for place in [Place::Endpoint(1), Place::Version(0), Place::Any, Place::Ready] {
            prop_assert_eq!(queue.waiting_for(place), waiting_for(place));
            prop_assert_eq!(queue.has_lane(place), !waiting_for(place).is_empty());
        }
        prop_assert_eq!(queue.all_in_lanes().len(), model.waiting.len() - waiting_for(Place::Turn).len());
        let next = model.waiting.iter().map(|one| one.deadline).min();
        prop_assert_eq!(queue.next_deadline(), next.map(at));
    }
    let rest: Vec<Ticket> = model.waiting.iter().map(|one| one.ticket).collect();
    for ticket in rest {
        queue.leave(ticket);
    }
    let Queue { lanes, flows, sessions, deadlines, placeable, .. } = &queue;
    prop_assert!(lanes.is_empty() && flows.is_empty() && sessions.is_empty() && deadlines.is_empty());
    prop_assert_eq!(*placeable, 0);
    Ok(())
}

fn arrival(class: u8, principal: u8, place: Place) -> Arrival<()> {
    Arrival {
        class: Class(class),
        principal: (principal > 0).then_some([principal; 16]),
        session: None,
        place,
        deadline: crate::ids::now() + Duration::from_secs(30),
        beyond_max: false,
        waiter: (),
    }
}

fn offer(endpoint: u32) -> Offer {
    Offer { endpoint, version: 0, slot: true, open: true, common: true }
}

fn drain(queue: &mut Queue<()>, endpoint: u32) -> Vec<Ticket> {
    let mut order = Vec::new();
    while let Some(next) = queue.first(offer(endpoint)) {
        queue.take(next, offer(endpoint));
        order.push(next);
    }
    order
}

#[test]
fn a_header_that_says_nothing_usable_is_the_default_and_extremes_are_the_ends() {
    let class = |text: &str| Class::of_header(Some(text.as_bytes())).0;
    assert_eq!(Class::of_header(None).0, 3);
    assert_eq!((class(" 0 "), class("7"), class("5")), (0, 7, 5));
    assert_eq!((class("-4"), class("99"), class("high"), class("")), (0, 7, 3, 3));
}

#[test]
fn a_pinned_waiter_of_another_endpoint_blocks_nobody() {
    let now = crate::ids::now();
    let mut queue = Queue::new(10);
    let elsewhere = queue.push(arrival(0, 0, Place::Endpoint(1)), now).expect("room");
    let turn = queue.push(arrival(0, 0, Place::Turn), now).expect("room");
    let any = queue.push(arrival(3, 0, Place::Any), now).expect("room");
    assert_eq!(drain(&mut queue, 0), [any]);
    assert_eq!(drain(&mut queue, 1), [elsewhere]);
    assert_eq!(queue.place(turn), Some(Place::Turn));
}

#[test]
fn principals_take_turns_and_a_crowd_delays_a_newcomer_by_one() {
    let now = crate::ids::now();
    let mut queue = Queue::new(100);
    let crowd: Vec<Ticket> = (0..50).map(|_| queue.push(arrival(3, 1, Place::Any), now).expect("room")).collect();
    let few: Vec<Ticket> = (0..2).map(|_| queue.push(arrival(3, 2, Place::Version(0)), now).expect("room")).collect();
    let order = drain(&mut queue, 0);
    assert_eq!(order[..5], [crowd[0], few[0], crowd[1], few[1], crowd[2]]);
}

#[test]
fn of_one_session_none_overtakes_another() {
    let now = crate::ids::now();
    let mut queue = Queue::new(100);
    let of_session = |class, place| Arrival { session: Some(7), ..arrival(class, 0, place) };
    let first = queue.push(of_session(5, Place::Endpoint(1)), now).expect("room");
    let urgent = queue.push(of_session(0, Place::Any), now).expect("room");
    assert_eq!(drain(&mut queue, 0), [], "the later one waits where the first does");
    queue.sort(urgent, Place::Any);
    assert_eq!(drain(&mut queue, 0), [first, urgent]);
}

/// A class that is due in one lane is due as a whole: those of it that may go elsewhere don't overtake those that can't.
#[test]
fn within_a_class_the_first_to_come_goes_first_even_when_due() {
    let now = crate::ids::now();
    let mut queue = Queue::new(usize::MAX);
    let pinned = queue.push(arrival(5, 0, Place::Endpoint(0)), now).expect("there is room");
    let any = queue.push(arrival(5, 0, Place::Any), now).expect("there is room");
    for _ in 0..PASSED_MAX {
        let urgent = queue.push(arrival(0, 1, Place::Any), now).expect("there is room");
        assert_eq!(queue.first(offer(1)), Some(urgent));
        queue.take(urgent, offer(1));
    }
    assert_eq!(drain(&mut queue, 0), [pinned, any]);
}

#[test]
fn readiness_alone_serves_those_who_need_no_slot() {
    let now = crate::ids::now();
    let mut queue = Queue::new(100);
    let start = queue.push(arrival(3, 0, Place::Any), now).expect("room");
    let reader = queue.push(arrival(3, 0, Place::Ready), now).expect("room");
    let full = Offer { slot: false, ..offer(0) };
    assert_eq!(queue.first(full), Some(reader));
    queue.take(reader, full);
    assert_eq!(queue.first(full), None);
    assert_eq!(queue.first(Offer { open: false, ..offer(0) }), None, "a draining endpoint takes its own only");
    assert_eq!(queue.first(offer(0)), Some(start));
}

#[test]
fn thousands_come_and_go_while_one_waits() {
    let now = crate::ids::now();
    let mut queue = Queue::new(10_000);
    let patient = queue.push(arrival(7, 0, Place::Endpoint(9)), now).expect("room");
    for _ in 0..100_000 {
        let ticket = queue.push(arrival(3, 0, Place::Any), now).expect("room");
        assert_eq!(queue.position(ticket), Some(2));
        assert_eq!(queue.first(offer(0)), Some(ticket));
        queue.take(ticket, offer(0));
    }
    assert_eq!(queue.position(patient), Some(1));
    assert!(queue.oldest_age(now + Duration::from_secs(3)) >= Duration::from_secs(3));
}
