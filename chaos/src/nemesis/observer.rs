//! The cluster as its own command line shows it, asked again and again.

use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value as Json;
use weft_node::local_cluster::Agents;

/// Asks on a thread of its own, until it is dropped: a question may take seconds while there is no leader.
pub(super) struct Observer {
    view: Arc<Mutex<Option<View>>>,
    thread: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
}

/// What one round of questions showed.
#[derive(Clone, Debug)]
pub(super) struct View {
    /// When it was asked for.
    pub(super) asked: Instant,
    nodes: Json,
    drives: Json,
    volumes: Json,
}

impl Observer {
    /// Of a cluster, by whichever agent answers.
    pub(super) fn new(agents: &Agents) -> Self {
        let view = Arc::new(Mutex::new(None));
        let shown = Arc::clone(&view);
        let (stop, stopped) = mpsc::channel();
        let mut questions = ["node", "drive", "volume"].map(|noun| {
            let mut question = agents.command(&["--json", noun, "list"]);
            question.stderr(Stdio::null());
            question
        });
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(Duration::from_millis(500)) == Err(mpsc::RecvTimeoutError::Timeout) {
                let asked = Instant::now();
                let [nodes, drives, volumes] = questions.each_mut().map(answer);
                if let (Some(nodes), Some(drives), Some(volumes)) = (nodes, drives, volumes) {
                    let fresh = View {
                        asked,
                        nodes,
                        drives,
                        volumes,
                    };
                    if let Ok(mut view) = shown.lock() {
                        *view = Some(fresh);
                    }
                }
            }
        });
        Self {
            view,
            thread: Some((stop, thread)),
        }
    }

    /// The last one; `None` before the first.
    pub(super) fn view(&self) -> Option<View> {
        self.view.lock().ok()?.clone()
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

impl View {
    /// Whether node `name` owns a volume.
    pub(super) fn owns(&self, name: &str) -> bool {
        let id = &named(&self.nodes, name)["id"];
        entries(&self.volumes).any(|volume| owner(volume) == Some(id))
    }

    /// What node `name` lacks to be in full service. The drives of node `removed` are not missed.
    pub(super) fn unsound(&self, name: &str, removed: Option<&str>) -> Option<String> {
        let own = named(&self.nodes, name);
        if own["state"] != "Up" {
            return Some(format!("{name} is not up"));
        }
        let removed = removed.map(|removed| &named(&self.nodes, removed)["id"]);
        let drives = entries(&self.drives).filter(|drive| removed != Some(&drive["home"]["Node"]));
        for drive in drives {
            let drive_name = &drive["name"];
            let at_home = drive["home"]["Node"] == own["id"];
            if at_home && drive["state"] != "Online" {
                return Some(format!("drive {drive_name} of {name} is {}", drive["state"]));
            }
            // Both ways: the node on every drive, and everybody on the node's drive.
            for other in entries(&self.nodes).filter(|other| at_home || other["id"] == own["id"]) {
                let incarnation = other["incarnation"].to_string();
                if other["state"] == "Up" && drive["registrations"][incarnation.trim_matches('"')].is_null() {
                    return Some(format!(
                        "{} is not registered on drive {drive_name}",
                        other["name"]
                    ));
                }
            }
        }
        None
    }

    /// The volumes that nobody serves.
    pub(super) fn unserved(&self) -> impl Iterator<Item = String> {
        entries(&self.volumes).filter_map(|volume| {
            let phase = &volume["phase"];
            phase["Serving"]
                .is_null()
                .then(|| format!("volume {} is {phase}", volume["name"]))
        })
    }
}

fn answer(question: &mut Command) -> Option<Json> {
    let output = question.output().ok()?;
    serde_json::from_slice(&output.stdout).ok()
}

fn entries(list: &Json) -> impl Iterator<Item = &Json> {
    list.as_array().into_iter().flatten()
}

fn named<'a>(list: &'a Json, name: &str) -> &'a Json {
    entries(list)
        .find(|entry| entry["name"] == name)
        .unwrap_or(&Json::Null)
}

/// The node that owns a volume, in whichever phase.
fn owner(volume: &Json) -> Option<&Json> {
    let phase = volume["phase"].as_object()?.values().next()?;
    phase.get("owner").map(|owner| &owner["node"])
}
