//! Agent: an endpoint that streams, answers shortly, fails, falls silent and dies, as its requests and the plan say.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use longhaul::net::simulated::Listener;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::oracle::{Carrier, WorkId};
use crate::shape::{agent_address, agent_host};
use crate::wire::{Head, Wire};
use crate::world::World;

pub struct Agent {
    pub index: usize,
    /// Everything that it does; empty while it is dead.
    tasks: RefCell<JoinSet<()>>,
    /// It does nothing at all until then.
    pub stands_until: Cell<Option<Instant>>,
    /// It says that it drains.
    pub drains: Cell<bool>,
    /// Of LangGraph: by id.
    runs: RefCell<HashMap<String, BackgroundRun>>,
    next_run: Cell<u64>,
}

struct BackgroundRun {
    status: &'static str,
    work: WorkId,
}

/// How an agent ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// Its process: the system closes its sockets.
    Process,
    /// Its machine: nobody says anything.
    Machine,
}

/// What a request wants of the agent that gets it.
struct Errand {
    token: String,
    session: Option<String>,
    events: u64,
    gap: Duration,
    /// `none`, `status` (500), `cut` (closes within the answer), `silence`, `refuse` (closes without an answer).
    failure: String,
    /// It goes on though nobody listens.
    ignores_leaving: bool,
}

impl Errand {
    fn of(head: &Head) -> Errand {
        Errand {
            token: head.field("x-token").unwrap_or_default().to_owned(),
            session: head.field("x-session").map(str::to_owned),
            events: head.number("x-events").unwrap_or(1),
            gap: Duration::from_millis(head.number("x-gap").unwrap_or(10)),
            failure: head.field("x-failure").unwrap_or("none").to_owned(),
            ignores_leaving: head.field("x-stubborn").is_some(),
        }
    }
}

impl Agent {
    pub fn new(index: usize) -> Rc<Agent> {
        Rc::new(Agent {
            index,
            tasks: RefCell::default(),
            stands_until: Cell::default(),
            drains: Cell::default(),
            runs: RefCell::default(),
            next_run: Cell::default(),
        })
    }

    /// Begins to listen, if it does not already.
    pub fn start(self: &Rc<Agent>, world: &Rc<World>) {
        let Ok(listener) = world.network.bind(agent_address(self.index)) else { return };
        let (agent, world) = (Rc::clone(self), Rc::clone(world));
        self.tasks.borrow_mut().spawn_local(async move { agent.accept(&world, listener).await });
    }

    pub fn die(&self, world: &World, death: Death) {
        if death == Death::Machine {
            world.network.cut_power(agent_host(self.index));
        }
        // Its tasks and with them its sockets.
        self.tasks.take();
        self.runs.borrow_mut().clear();
        self.stands_until.set(None);
        world.oracle.borrow_mut().end_all(self.index);
    }

    async fn accept(self: &Rc<Agent>, world: &Rc<World>, listener: Listener) {
        loop {
            let Ok((stream, _)) = listener.accept().await else { return };
            let (agent, world) = (Rc::clone(self), Rc::clone(world));
            let mut tasks = self.tasks.borrow_mut();
            while tasks.try_join_next().is_some() {}
            tasks.spawn_local(async move { agent.serve(&world, Wire::new(stream)).await });
        }
    }

    async fn serve(self: &Rc<Agent>, world: &Rc<World>, mut wire: Wire) {
        while let Ok(Some(head)) = wire.head().await {
            let _ = wire.body(&head).await;
            self.stand().await;
            if !self.answer(world, &mut wire, &head).await {
                return;
            }
        }
    }

    /// Waits while it is stopped.
    async fn stand(&self) {
        while let Some(until) = self.stands_until.get().filter(|until| *until > Instant::now()) {
            tokio::time::sleep_until(until).await;
        }
    }

    /// False where the connection is to be closed.
    async fn answer(self: &Rc<Agent>, world: &Rc<World>, wire: &mut Wire, head: &Head) -> bool {
        let mut words = head.line.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let path = target.split('?').next().unwrap_or_default();
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        match (method, parts.as_slice()) {
            ("GET", ["health"]) => {
                let drains = u8::from(self.drains.get());
                let answer = format!("HTTP/1.1 200 OK\r\nlonghaul-drain: {drains}\r\ncontent-length: 0\r\n\r\n");
                wire.write(&answer).await.is_ok()
            }
            ("POST", [_, "run"] | [_, "runs", "stream"]) => self.run(world, wire, Errand::of(head)).await,
            ("POST", [_, "threads", thread, "runs"]) => self.begin_run(world, wire, Errand::of(head), thread).await,
            ("GET", [_, "threads", _, "runs", run]) => {
                let status = self.runs.borrow().get(*run).map(|run| run.status);
                match status {
                    Some(status) => self.json(wire, 200, &format!(r#"{{"run_id":"{run}","status":"{status}"}}"#)).await,
                    None => self.json(wire, 404, r#"{"detail":"Run not found"}"#).await,
                }
            }
            ("POST", [_, "threads", _, "runs", run, "cancel"]) => {
                world.trace.note(format!("agent {} is told to cancel {run}", self.index));
                self.end_run(world, run, "interrupted");
                self.json(wire, 202, "").await
            }
            _ => self.json(wire, 404, "{}").await,
        }
    }

    async fn json(&self, wire: &mut Wire, status: u16, body: &str) -> bool {
        let index = self.index;
        let answer = format!(
            "HTTP/1.1 {status} Said\r\ncontent-type: application/json\r\nx-agent: {index}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        wire.write(&answer).await.is_ok()
    }

    /// A run that its request carries.
    async fn run(self: &Rc<Agent>, world: &Rc<World>, wire: &mut Wire, errand: Errand) -> bool {
        let carrier = Carrier::Connection(wire.stream.connection());
        let work = self.begin_work(world, errand.session.clone(), carrier, &errand.token);
        let kept = self.carry(wire, &errand).await;
        world.oracle.borrow_mut().answered(self.index, errand.failure == "none");
        // Where the agent has died meanwhile it is gone already.
        world.oracle.borrow_mut().end(work);
        world.trace.note(format!(
            "agent {} has done with {}{}",
            self.index,
            errand.token,
            if kept { "" } else { " and closes" }
        ));
        kept
    }

    fn begin_work(&self, world: &World, session: Option<String>, carrier: Carrier, token: &str) -> WorkId {
        let service = &world.shape.services[world.shape.service_of(self.index)];
        world.trace.note(format!("agent {} begins {token} of {session:?}", self.index));
        let (work, wrong) = world.oracle.borrow_mut().begin(self.index, session, service.takes_turns(), carrier);
        wrong.iter().for_each(|wrong| world.trace.violation(wrong));
        work
    }

    async fn carry(&self, wire: &mut Wire, errand: &Errand) -> bool {
        let index = self.index;
        let Errand { token, events, failure, .. } = errand;
        match failure.as_str() {
            "refuse" => return false,
            "silence" => {
                wire.left().await;
                return false;
            }
            "status" => {
                let body = "failed";
                let head = format!(
                    "HTTP/1.1 500 Failed\r\nx-agent: {index}\r\nx-token: {token}\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                );
                return wire.write(&head).await.is_ok();
            }
            _ => {}
        }
        if *events == 0 {
            self.rest(wire, errand).await;
            let body = format!("data: {token} short\n\n");
            let head = format!(
                "HTTP/1.1 200 OK\r\nx-agent: {index}\r\nx-token: {token}\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            return wire.write(&head).await.is_ok();
        }
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-agent: {index}\r\nx-token: {token}\r\n\
             transfer-encoding: chunked\r\n\r\n"
        );
        if wire.write(&head).await.is_err() {
            return false;
        }
        for number in 0..*events {
            if !self.rest(wire, errand).await {
                return false;
            }
            if failure == "cut" && number == events / 2 {
                return false;
            }
            let event = format!("data: {token} {number}\n\n");
            if wire.write(&format!("{:x}\r\n{event}\r\n", event.len())).await.is_err() && !errand.ignores_leaving {
                return false;
            }
        }
        wire.write("0\r\n\r\n").await.is_ok()
    }

    /// Between two events. False: nobody listens any more.
    async fn rest(&self, wire: &mut Wire, errand: &Errand) -> bool {
        self.stand().await;
        if errand.ignores_leaving {
            sleep(errand.gap).await;
            return true;
        }
        // The request is whole: whatever comes now is the end.
        tokio::select! {
            biased;
            () = wire.left() => false,
            () = sleep(errand.gap) => true,
        }
    }

    /// A run that goes on when it was answered that it has begun.
    async fn begin_run(self: &Rc<Agent>, world: &Rc<World>, wire: &mut Wire, errand: Errand, thread: &str) -> bool {
        let began = Instant::now();
        let carrier = Carrier::Connection(wire.stream.connection());
        let work = self.begin_work(world, Some(thread.to_owned()), carrier, &errand.token);
        world.oracle.borrow_mut().answered(self.index, errand.failure == "none");
        match errand.failure.as_str() {
            "none" | "cut" => {}
            "status" => {
                world.oracle.borrow_mut().end(work);
                return self.json(wire, 500, "{}").await;
            }
            _ => {
                if errand.failure == "silence" {
                    wire.left().await;
                }
                world.oracle.borrow_mut().end(work);
                return false;
            }
        }
        // It takes its time to answer that it has begun, and does not look whether anybody still waits for that.
        sleep(errand.gap).await;
        self.next_run.set(self.next_run.get() + 1);
        let run = format!("22222222-2222-4222-8{:03}-{:012}", self.index, self.next_run.get());
        self.runs.borrow_mut().insert(run.clone(), BackgroundRun { status: "running", work });
        let takes = errand.gap * errand.events.max(1) as u32;
        {
            let (agent, world, run) = (Rc::clone(self), Rc::clone(world), run.clone());
            self.tasks.borrow_mut().spawn_local(async move {
                sleep(takes).await;
                agent.stand().await;
                agent.end_run(&world, &run, "success");
            });
        }
        let body = format!(r#"{{"run_id":"{run}","thread_id":"{thread}","status":"pending"}}"#);
        let index = self.index;
        let location = format!("/threads/{thread}/runs/{run}");
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-location: {location}\r\nx-agent: {index}\r\n\
             x-token: {}\r\ncontent-length: {}\r\n\r\n{body}",
            errand.token,
            body.len()
        );
        let written = wire.write(&head).await.is_ok();
        if !written || world.network.is_left(wire.stream.connection(), 1) {
            // The proxy does not know that there is such a run.
            let mut oracle = world.oracle.borrow_mut();
            oracle.end(work);
            if !oracle.is_troubled(self.index, began) {
                let token = &errand.token;
                world.trace.violation(format!("the proxy did not wait to hear that {token} had begun as {run}"));
            }
            return false;
        }
        world.oracle.borrow_mut().detach(work);
        true
    }

    fn end_run(&self, world: &World, run: &str, status: &'static str) {
        if let Some(run) = self.runs.borrow_mut().get_mut(run)
            && run.status == "running"
        {
            run.status = status;
            world.oracle.borrow_mut().end(run.work);
        }
    }
}
