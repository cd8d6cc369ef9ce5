//! Deliberate breaches of the rules, for the simulator to catch.
//!
//! Each variant leaves out one rule of the commit protocol (docs/format-layer.md). They exist only
//! with the cargo feature `mutations`, which nothing but the test crate enables: a rule whose
//! breach no test notices is not tested.

use super::core::Core;
use super::log::FlightState;
use super::map::Frozen;
use super::node::{Entry, LEAF_ENTRIES};
use super::record::Run;

/// A rule to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A write is reported when its own record has completed, whatever became of earlier ones.
    ReportBeforeEarlierRecord,
    /// Records enter the map in the order in which they complete.
    PublishOutOfOrder,
    /// A flush joins a sync that was submitted before it.
    FlushJoinsSubmittedSync,
    /// A flush is reported without a sync.
    FlushWithoutSync,
    /// With the write cache off, writes are reported before a sync.
    WriteThroughWithoutSync,
    /// A record that failed is left as it is.
    FailedRecordNotVoided,
    /// After a failed sync the next one is believed.
    FailedSyncForgotten,
    /// Recovery believes a record by its checksum and sequence number alone.
    RecoveryIgnoresChain,
    /// Recovery does not look at the data blocks of a record.
    RecoveryIgnoresData,
    /// Recovery serves what it found before it is durable.
    RecoveryWithoutSync,
    /// Recovery reads a layer whose last user may still have writes in flight.
    RecoveryIgnoresLock,
    /// A damaged slot is passed over although the log of the other does not reach it.
    FallbackWithoutLog,
    /// A checkpoint holds entries of records that have not completed.
    FuzzyCheckpoint,
    /// A checkpoint holds the usage of segments after records that it does not include.
    UsageAsOfNow,
    /// A slot names a checkpoint that was not synced.
    SlotBeforeSync,
    /// A slot names a position of the log up to which it was not synced.
    SlotNamesUnsynced,
    /// Segments are freed before the slot that allows it is durable.
    SlotNotSynced,
    /// A segment is reused although the older slot still needs it.
    ReuseAfterOneSlot,
    /// A segment is reused while reads of it are in flight.
    ReuseWithoutEpochs,
    /// Shrinking leaves the cut range mapped.
    ShrinkWithoutZeroing,
    /// Writers of a block under merge do not wait.
    MergeWithoutMark,
    /// Lanes are closed, and their segments free, before a record says so.
    LanesClosedSilently,
    /// A slot names a base record that is not written yet.
    SlotBeforeBaseRecord,
    /// A base record is overwritten while the older slot still names it.
    BaseInOneSlot,
    /// What lies below is copied up over what a guest writes meanwhile.
    CopyUpOverWriter,
    /// A commit changes the base before the layer says so.
    CommitWithoutMark,
    /// A layer lets go of what a guest writes meanwhile.
    ShedOverWriter,
    /// A layer lets go of what its base holds before that is durable there.
    ShedBeforeBaseSync,
    /// A commit is said to be over before the base is durable.
    UnmarkBeforeBaseSync,
    /// A flush of a layer is reported before the layer from which it took over is durable.
    FlushBeforeBaseSync,
    /// A queue starts on the new layer while others are still on the old one.
    StartBeforeOthersLeft,
    /// A running disk is switched to a new layer before that was committed.
    SwitchBeforeCommit,
}

impl Mutation {
    /// Every mutation that histories of one disk can show; those of changes of base have histories
    /// of their own.
    pub const ALL: [Self; 22] = [
        Self::ReportBeforeEarlierRecord,
        Self::PublishOutOfOrder,
        Self::FlushJoinsSubmittedSync,
        Self::FlushWithoutSync,
        Self::WriteThroughWithoutSync,
        Self::FailedRecordNotVoided,
        Self::FailedSyncForgotten,
        Self::RecoveryIgnoresChain,
        Self::RecoveryIgnoresData,
        Self::RecoveryWithoutSync,
        Self::RecoveryIgnoresLock,
        Self::FallbackWithoutLog,
        Self::FuzzyCheckpoint,
        Self::UsageAsOfNow,
        Self::SlotBeforeSync,
        Self::SlotNamesUnsynced,
        Self::SlotNotSynced,
        Self::ReuseAfterOneSlot,
        Self::ReuseWithoutEpochs,
        Self::ShrinkWithoutZeroing,
        Self::MergeWithoutMark,
        Self::LanesClosedSilently,
    ];
}

impl Core {
    /// [`Mutation::ReportBeforeEarlierRecord`] and [`Mutation::PublishOutOfOrder`].
    pub(super) fn breach_order(&mut self, sequence: u64) {
        let report = self.tuning.mutation == Some(Mutation::ReportBeforeEarlierRecord);
        let publish = report || self.tuning.mutation == Some(Mutation::PublishOutOfOrder);
        let flight = self.log.flight(sequence);
        if !publish || flight.state != FlightState::Done {
            return;
        }
        let runs = std::mem::take(&mut flight.runs);
        let waiters = if report { std::mem::take(&mut flight.waiters) } else { Vec::new() };
        self.apply(&runs);
        waiters.into_iter().for_each(|(waiter, place)| self.end(waiter, Ok(()), place));
    }

    /// [`Mutation::FuzzyCheckpoint`].
    pub(super) fn breach_freeze(&self, mut frozen: Frozen) -> Frozen {
        if self.tuning.mutation != Some(Mutation::FuzzyCheckpoint) {
            return frozen;
        }
        for (run, place) in self.log.flights.iter().flat_map(|flight| &flight.runs) {
            let Run::Data { start, count } = *run else { continue };
            for (block, place) in (start..start + u64::from(count)).zip(*place..) {
                let leaf = (block / LEAF_ENTRIES as u64) as u32;
                if let Some((_, table)) = frozen.leaves.iter_mut().find(|(index, _)| *index == leaf) {
                    table.table_mut()[block as usize % LEAF_ENTRIES] = Entry(place);
                }
            }
        }
        frozen
    }
}
