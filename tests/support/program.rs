//! Program: the built binary as a child process, with its output read line by line.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use super::{eventually, eventually_within};

/// A running `longhaul`. Dropping it kills the child.
pub struct Program {
    child: Child,
    /// What it wrote so far, both streams, line by line in the order of arrival.
    lines: Arc<Mutex<Vec<String>>>,
}

impl Program {
    /// Starts `longhaul ARGUMENTS`.
    pub fn start(arguments: &[&str]) -> Program {
        Program::spawn(Command::new(env!("CARGO_BIN_EXE_longhaul")).args(arguments).stdin(Stdio::null()))
    }

    /// Starts a command that becomes `longhaul`.
    pub fn spawn(command: &mut Command) -> Program {
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary was built with the tests");
        let lines = Arc::new(Mutex::new(Vec::new()));
        collect(child.stdout.take().expect("piped"), Arc::clone(&lines));
        collect(child.stderr.take().expect("piped"), Arc::clone(&lines));
        Program { child, lines }
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().expect("no reader panicked").clone()
    }

    /// The rest of the first line that contains `text`, after `text`; waits for it.
    pub async fn after(&self, text: &str) -> String {
        let find = || self.lines().iter().find_map(|line| line.split_once(text).map(|(_, rest)| rest.to_owned()));
        eventually(&format!("the program prints {text:?}; so far: {:#?}", self.lines()), || find().is_some()).await;
        find().expect("just seen")
    }

    /// The number of the process, for signals.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by name (`TERM`, `HUP`).
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.id().to_string()]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name}");
    }

    /// Waits for the end.
    pub async fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        let child = &mut self.child;
        eventually_within(std::time::Duration::from_secs(20), "the program ends", || {
            status = child.try_wait().expect("a child of ours");
            status.is_some()
        })
        .await;
        status.expect("just seen")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(stream: impl Read + Send + 'static, lines: Arc<Mutex<Vec<String>>>) {
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines() {
            let Ok(line) = line else { return };
            lines.lock().expect("no reader panicked").push(line);
        }
    });
}
