//! Checkpoints: what changed becomes a run, and the root says so.
//!
//! A checkpoint takes three steps: [`PageMap::freeze`] at the moment whose state the root will have, [`PageMap::write_frozen`]
//! while new changes go on, and [`PageMap::snapshot`] for the root. An error in between costs nothing: what was frozen
//! stays in memory, answers lookups, and is written by the next try.

use std::rc::Rc;

use super::address::PageId;
use super::garbage::Survey;
use super::run::RunDescriptor;
use super::store::MapError;
use super::writer::RunWriter;
use super::{MapRoot, PageMap, Run, RunRoot};

impl PageMap {
    /// Sets the changes so far apart for the next run; later ones go to a new delta. `false` when the last ones set
    /// apart have not been written yet.
    ///
    /// The engine captures append rows, H and counters in the same step, without an await in between: what is
    /// not in this freeze must be found by a replay.
    pub fn freeze(&self) -> bool {
        let mut frozen = self.frozen.borrow_mut();
        if frozen.is_some() {
            return false;
        }
        let successor = self.delta.borrow().successor();
        let delta = self.delta.replace(successor);
        self.sequence_frozen
            .set(self.sequence_frozen.get().max(delta.sequence_max()));
        *frozen = Some(Rc::new(delta));
        self.generation.set(self.generation.get() + 1);
        true
    }

    /// Writes what was frozen as a run, which the map uses from then on. After an error it may be called again.
    pub async fn write_frozen(&self) -> Result<(), MapError> {
        let _one_at_a_time = self.writing.lock().await;
        let Some(frozen) = self.frozen.borrow().clone() else {
            return Ok(());
        };
        let mut written = None;
        let mut survey = Survey::new(self.surveys_closely.get());
        if !frozen.is_empty() {
            let number = self.next_run()?;
            let _unfinished = Unfinished::new(self, number);
            let pending = Rc::clone(&self.pending_counts);
            let mut writer = RunWriter::new(Rc::clone(&self.pages), number, pending);
            let older = Rc::clone(&self.runs.borrow());
            for item in frozen.items() {
                survey.look(&item, &older, &self.pages).await;
                writer.push(&item)?;
                if writer.is_full() {
                    writer.flush().await?;
                }
            }
            written = writer.finish().await?;
        }
        let mut runs = self.runs.borrow().to_vec();
        if let Some((descriptor, page_counts)) = written {
            runs.insert(0, Run::new(descriptor, page_counts));
        }
        *self.runs.borrow_mut() = runs.into();
        self.record_counts.borrow_mut().add_all(frozen.counts());
        self.garbage.borrow_mut().add(&survey);
        *self.frozen.borrow_mut() = None;
        self.installed.set(self.generation.get());
        Ok(())
    }

    /// What the next root says of the map: the runs as they are now. Changes since the last freeze are not in it.
    #[must_use]
    pub fn snapshot(&self) -> MapRoot {
        let runs = self.runs.borrow();
        let tops: Vec<PageId> = runs.iter().map(|run| run.descriptor.top_id()).collect();
        MapRoot {
            runs: runs
                .iter()
                .map(|run| RunRoot {
                    run: RunDescriptor {
                        top: self.pages.place(run.descriptor.top_id(), run.descriptor.top),
                        ..run.descriptor
                    },
                    page_counts: run.page_counts.borrow().iter().collect(),
                })
                .collect(),
            moved: self
                .pages
                .moved()
                .into_iter()
                .filter(|(id, _)| !tops.contains(id))
                .map(|(id, place)| (id.lba(), place))
                .collect(),
            record_counts: self.record_counts.borrow().iter().collect(),
            run_next: self.run_next.get(),
        }
    }
}

/// Lists a run as unfinished while it lives.
pub(crate) struct Unfinished<'a> {
    map: &'a PageMap,
    number: u32,
    kept: bool,
}

impl<'a> Unfinished<'a> {
    pub(crate) fn new(map: &'a PageMap, number: u32) -> Self {
        let mut unfinished = map.unfinished.borrow_mut();
        if !unfinished.contains(&number) {
            unfinished.push(number);
        }
        Self {
            map,
            number,
            kept: false,
        }
    }

    /// The run stays unfinished, between two steps.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let mut unfinished = self.map.unfinished.borrow_mut();
            unfinished.retain(|number| *number != self.number);
        }
    }
}
