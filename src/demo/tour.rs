//! Tour: what the demo prints, every line of it made to be pasted.

use std::fmt;

use super::agent::Agent;

/// The name of the demo's service.
pub const SERVICE: &str = "agents";

/// Everything that the printed lines name.
pub struct Tour<'a> {
    /// `host:port`.
    pub proxy: String,
    /// `host:port`.
    pub admin: String,
    pub config_file: String,
    pub agents: &'a [Agent],
    /// How to call this program in a shell.
    pub program: String,
    /// Something out of the ordinary, said before the tour.
    pub note: Option<String>,
}

impl fmt::Display for Tour<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tour { proxy, admin, .. } = self;
        writeln!(out, "longhaul demo: agents behind one proxy. Ctrl-C ends it.\n")?;
        if let Some(note) = &self.note {
            writeln!(out, "  {note}\n")?;
        }
        writeln!(out, "  proxy      http://{proxy}")?;
        writeln!(out, "  live page  http://{admin}/")?;
        for agent in self.agents {
            writeln!(out, "  agent      http://{}  {} (version {})", agent.address, agent.name, agent.version)?;
        }
        writeln!(out, "  config     {}  (edit it: it is reloaded)", self.config_file)?;
        writeln!(out, "\nPaste the indented lines into another terminal, in this order.")?;
        for (index, step) in self.steps().iter().enumerate() {
            writeln!(out, "\n{}. {}", index + 1, step.text)?;
            for line in &step.lines {
                writeln!(out, "     {line}")?;
            }
        }
        writeln!(out)
    }
}

/// One numbered step.
struct Step {
    text: &'static str,
    lines: Vec<String>,
}

impl Tour<'_> {
    fn steps(&self) -> Vec<Step> {
        let Tour { proxy, admin, program, .. } = self;
        let chat = format!("curl -sN http://{proxy}/chat -H 'content-type: application/json'");
        let drained = self.agents.first().map(|agent| agent.address.to_string().replace(':', "%3A"));
        let drained = drained.unwrap_or_default();
        let endpoint = format!("http://{admin}/api/v1/services/{SERVICE}/endpoints/{drained}");
        let admin_option = if admin.ends_with(&format!(":{}", super::ADMIN_PORT)) {
            String::new()
        } else {
            format!(" --admin http://{admin}")
        };
        vec![
            Step {
                text: "An agent streams its answer, token by token, for about four seconds.",
                lines: vec![format!("{chat} -d '{{\"message\": \"hello\", \"thread_id\": \"anna\"}}'")],
            },
            Step {
                text: "The same session goes to the same agent, which remembers it: this is turn 2, then turn 3.",
                lines: vec![
                    format!("{chat} -d '{{\"message\": \"again\", \"thread_id\": \"anna\"}}' | grep '\"turn\":'"),
                    format!("{chat} -H 'x-session-id: anna' -d '{{\"message\": \"by header\"}}' | grep '\"turn\":'"),
                ],
            },
            Step {
                text: "Ten new sessions at once spread evenly over the stable agents; about one in ten is on the canary.",
                lines: vec![format!(
                    "(for i in 1 2 3 4 5 6 7 8 9 10; do {chat} -H \"x-session-id: guest-$i\" -d '{{\"message\": \"hi\"}}' | grep '\"turn\":' & done; wait)"
                )],
            },
            Step {
                text: "A header sends a new session to the canary; the session stays there when the header is gone.",
                lines: vec![
                    format!(
                        "{chat} -H 'x-canary: 1' -H 'x-session-id: tester' -d '{{\"message\": \"try me\"}}' | grep '\"turn\":'"
                    ),
                    format!(
                        "{chat} -H 'x-session-id: tester' -d '{{\"message\": \"still there?\"}}' | grep '\"turn\":'"
                    ),
                ],
            },
            Step {
                text: "Who has how much work? Start two runs of 20 seconds, then ask (or open the live page).",
                lines: vec![
                    format!(
                        "(for i in 1 2; do curl -sN http://{proxy}/slow -H 'accept: text/event-stream' > /dev/null & done)"
                    ),
                    format!("sleep 1; {program} status{admin_option}"),
                ],
            },
            Step {
                text: "Drain an agent: what runs there finishes, its sessions move at their next turn, the others stay.",
                lines: vec![
                    format!("curl -s -X POST {endpoint}/drain"),
                    format!(
                        "(for i in 1 2 3 4 5 6 7 8 9 10; do {chat} -i -H \"x-session-id: guest-$i\" -d '{{\"message\": \"back\"}}' | grep -iE 'affinity|\"turn\":' & done; wait)"
                    ),
                    format!("curl -s -X POST {endpoint}/undrain"),
                ],
            },
            Step {
                text: "The same numbers for Prometheus.",
                lines: vec![format!(
                    "curl -s http://{admin}/metrics | grep -E '^longhaul_(runs_total|endpoint_outstanding_runs|affinity_total|sessions)'"
                )],
            },
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tour(admin_port: u16) -> String {
        let agents = [Agent { name: "stable-1", version: "stable", address: ([127, 0, 0, 1], 4001).into() }];
        Tour {
            proxy: "127.0.0.1:8080".to_owned(),
            admin: format!("127.0.0.1:{admin_port}"),
            config_file: "longhaul.yaml".to_owned(),
            agents: &agents,
            program: "longhaul".to_owned(),
            note: None,
        }
        .to_string()
    }

    #[test]
    fn every_step_is_numbered_and_can_be_pasted() {
        let text = tour(9901);
        for number in 1..=7 {
            let heading = format!("\n{number}. ");
            let step = text.split(&heading).nth(1).expect("the step is there");
            let line = step.lines().nth(1).expect("a line to paste follows");
            assert!(line.starts_with("     ") && line.contains("http://"), "{line}");
        }
        assert!(text.is_ascii(), "plain text only");
    }

    #[test]
    fn commands_name_the_admin_address_only_where_it_is_not_the_default() {
        assert!(tour(9901).contains("sleep 1; longhaul status\n"));
        assert!(tour(4444).contains("longhaul status --admin http://127.0.0.1:4444\n"));
    }

    #[test]
    fn the_drained_endpoint_is_percent_encoded() {
        assert!(tour(9901).contains("/api/v1/services/agents/endpoints/127.0.0.1%3A4001/drain"));
    }
}
