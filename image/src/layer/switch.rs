//! Changes the base of a layer in one step.
//!
//! Order: everything that the layer needs once it lies over the new base is in its log; then the
//! base record that no slot names, and a sync; then a checkpoint whose slot names the new record,
//! which is the commit point; then another, so that no slot names the old record any more, and its
//! block is free for the next change.

use std::sync::Arc;

use super::base::Below;
use super::base_record::{BaseRecord, BaseRef, base_offset};
use super::driver::Driver;
use super::tuning::breaks;
use super::waiter::Result;
use crate::below::Chain;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};

impl<E: Engine> Driver<E> {
    /// Lets the layer lie over `chain`, recorded as `named`. Where the layer itself holds nothing,
    /// the disk must read the same as before. After a failure the layer lies over the old base or
    /// the new one.
    pub(super) async fn switch_base(
        &self,
        chain: Option<Arc<Chain<E>>>,
        named: Option<BaseRef>,
        committing: bool,
    ) -> Result {
        let (slot_bases, tuning) = {
            let core = self.layer.core();
            (core.slot_bases, core.tuning)
        };
        if slot_bases[0] != slot_bases[1] && !breaks!(tuning, BaseInOneSlot) {
            self.checkpoint(None, false).await?;
        }
        let sequence = slot_bases[0] + 1;
        let record = BaseRecord { layer_id: self.layer.header().layer_id, sequence, committing, base: named };
        if breaks!(tuning, SlotBeforeBaseRecord) {
            self.name_base(sequence).await?;
        }
        let bytes = AlignedBuf::from_slice(&record.encode());
        self.io.run(Op::write(self.layer.file(), base_offset(sequence), bytes)).await.result?;
        self.sync_file().await?;
        // Zeroes are left out of the map only while no slot names a base that would show through.
        let below = Arc::new(Below::over(record, chain));
        if below.record.base.is_some() {
            self.layer.set_below(Arc::clone(&below));
        }
        self.name_base(sequence).await?;
        if !breaks!(tuning, BaseInOneSlot) {
            self.checkpoint(None, false).await?;
        }
        self.layer.set_below(below);
        Ok(())
    }

    /// Makes a checkpoint that belongs to base record `sequence`.
    async fn name_base(&self, sequence: u64) -> Result {
        self.layer.core().base_sequence = sequence;
        self.checkpoint(None, false).await.inspect_err(|_| {
            let mut core = self.layer.core();
            core.base_sequence = core.slot_bases[0];
        })
    }
}
