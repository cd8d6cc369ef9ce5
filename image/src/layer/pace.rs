//! How much space a layer may take, when the cleaner has to work for that, and when guests wait for it.
//!
//! The file may take its share of the live data and a constant. The cleaner begins well below that bound:
//! what it has emptied is free only after a checkpoint. While the file holds more than the target,
//! guests' data is let in at the pace of the cleaner, in small steps: each block they write
//! is a debt that the cleaner pays by what it gains. So nobody waits for long, and nobody waits who writes less than
//! the cleaner can do.

use super::core::Core;
use super::position::LANES;
use sapwood_blockdev::engine::Time;
use sapwood_blockdev::units::BLOCK_SIZE;

/// Blocks that guests may be ahead of the cleaner by: this part of the file's allowance, within bounds.
const AHEAD_PART: u64 = 128;
const AHEAD_BLOCKS: std::ops::RangeInclusive<u64> = 64..=2048;
/// The constant by which a file may exceed its share, in bytes, unless another one is set: this part of the disk,
/// within bounds.
const SLACK_PART: u64 = 10;
const SLACK_MIN: u64 = 64 << 20;
const SLACK_MAX: u64 = 2 << 30;
/// A checkpoint may cost this part of what is written between two.
const NODES_PART: u64 = 16;
/// Times the tuned bytes that may lie between two checkpoints, if nodes are many.
const CHECKPOINT_BYTES_TIMES: u64 = 4;
/// While the cleaner has to work, a checkpoint comes at the latest when this part of the file's allowance
/// was written.
const SPARE_PART: u64 = 8;
/// Checkpoints for no other reason than to free segments are this far apart.
const FREE_INTERVAL: Time = Time::from_secs(1);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Blocks that guests wrote and the cleaner has not paid for.
    debt: i64,
    /// No segment was worth cleaning when this had been published, and this many blocks written.
    fruitless: Option<(u64, u64)>,
    /// The cleaner waits for something to do.
    pub(super) idle: bool,
}

impl Core {
    /// Bytes that segments may take.
    pub(super) fn allowed_bytes(&self) -> u64 {
        let live = u128::from(self.live_bytes());
        let share = live * u128::from(self.tuning.space_percent) / 100;
        let slack = self.tuning.space_slack.unwrap_or((self.size / SLACK_PART).clamp(SLACK_MIN, SLACK_MAX));
        let wanted = u64::try_from(share).unwrap_or(u64::MAX).saturating_add(slack);
        // On a block device there may be less.
        let all = u64::from(self.segments.limit()) * self.segments.bytes();
        wanted.min(all.saturating_sub(self.beside_bytes()))
    }

    /// Bytes that the file may take beside: two segments for each lane of the log and a spare one, and what is kept back.
    pub(super) fn beside_bytes(&self) -> u64 {
        (self.reserve_segments() as u64 + 2 * LANES as u64 + 1) * self.segments.bytes()
    }

    fn live_bytes(&self) -> u64 {
        self.segments.live_blocks() * BLOCK_SIZE
    }

    fn spare_bytes(&self) -> u64 {
        self.allowed_bytes().saturating_sub(self.live_bytes())
    }

    /// Bytes that the log may grow by between two checkpoints: more than the tuning says where a checkpoint
    /// has much to store, less where the file has little room for what waits to be freed.
    pub(super) fn checkpoint_bytes(&self) -> u64 {
        let tuned = self.tuning.checkpoint_bytes;
        let bytes = (self.map.dirty_bytes() * NODES_PART).max(tuned);
        let is_tight =
            self.segments.occupied_bytes().saturating_sub(self.live_bytes()) > self.spare_bytes() / 2;
        bytes.min(if is_tight { self.checkpoint_bytes_max() } else { tuned * CHECKPOINT_BYTES_TIMES })
    }

    /// Most bytes that the log may grow by between two checkpoints when space is tight.
    fn checkpoint_bytes_max(&self) -> u64 {
        let part = (self.spare_bytes() / SPARE_PART).max(2 * self.segments.bytes());
        part.min(self.tuning.checkpoint_bytes * CHECKPOINT_BYTES_TIMES)
    }

    /// Bytes that segments may take before the cleaner has to work: the others are for what waits to be free.
    fn target_bytes(&self) -> u64 {
        let ahead = self.ahead_blocks() as u64 * BLOCK_SIZE;
        let waiting = (self.checkpoint_bytes_max() / 2 * 3 + ahead).min(self.spare_bytes() / 2);
        self.allowed_bytes() - waiting
    }

    /// Whether the cleaner has to work.
    pub(super) fn is_cleaning_wanted(&self) -> bool {
        self.is_over_target() || self.is_short_of_space()
    }

    fn is_over_target(&self) -> bool {
        // With less than this there is next to nothing to gain, whatever the target.
        let least = self.live_bytes() / 7 * 8 + 2 * self.segments.bytes();
        self.segments.held_bytes() > self.target_bytes().max(least)
    }

    /// Whether the cleaner has to work and can.
    pub(super) fn is_cleaning_due(&self) -> bool {
        let may_find = self.pace.fruitless.is_none_or(|(published, written)| {
            self.log.published.sequence > published
                && (self.is_short_of_space() || self.log.traffic.total() >= written)
        });
        // On a full host what is kept back is soon used up: a segment must be let go before the next.
        let may_begin =
            self.can_clean() && !(self.is_short_of_space() && self.segments.awaiting_checkpoint() > 0);
        self.is_cleaning_wanted() && may_begin && may_find && !self.closing && self.latched.is_none()
    }

    /// Whether a checkpoint should come for no other reason than to free segments.
    pub(super) fn is_freeing_due(&self, now: Time) -> bool {
        let wanted = self.segments.occupied_bytes() > self.target_bytes()
            && now >= self.checkpointed_at + FREE_INTERVAL;
        (wanted || self.is_full() || self.is_short_of_space()) && self.segments.awaiting_checkpoint() > 0
    }

    /// Whether the file may not take more, and a checkpoint helps: when those take long, or the bound has come
    /// down.
    pub(super) fn is_full(&self) -> bool {
        // What is in flight may fill two more. For a single segment it is not worth it: checkpoints fill some, too.
        let room = 2 * self.segments.bytes();
        self.segments.occupied_bytes() + room >= self.allowed_bytes()
            && self.segments.awaiting_checkpoint() > 1
    }

    /// Whether segments should be free at once when a checkpoint has found them empty.
    pub(super) fn is_freeing_wanted(&self) -> bool {
        self.segments.occupied_bytes() > self.target_bytes() || self.is_short_of_space()
    }

    /// When [`is_freeing_due`](Self::is_freeing_due) may become true with nothing else happening.
    pub(super) fn next_freeing(&self) -> Option<Time> {
        let wanted =
            self.segments.occupied_bytes() > self.target_bytes() && self.segments.awaiting_checkpoint() > 0;
        wanted.then(|| self.checkpointed_at + FREE_INTERVAL)
    }

    /// No segment is worth cleaning: not before more has been written.
    pub(super) fn note_fruitless(&mut self) {
        let segment_blocks = u64::from(self.segments.segment_blocks());
        self.pace.fruitless = Some((self.log.published.sequence, self.log.traffic.total() + segment_blocks));
        self.pay(self.pace.debt);
    }

    /// Blocks that guests may be ahead of the cleaner by.
    fn ahead_blocks(&self) -> i64 {
        let blocks = self.spare_bytes() / BLOCK_SIZE / AHEAD_PART;
        blocks.clamp(*AHEAD_BLOCKS.start(), *AHEAD_BLOCKS.end()) as i64
    }

    /// Guests' data was put on record: so many blocks.
    pub(super) fn owe(&mut self, blocks: u64) {
        self.pace.debt = match self.is_over_target() {
            // A quarter more than is written, so that the file comes back to its target. Copies from a base do not
            // wait, and must not make guests wait for long.
            true => (self.pace.debt + (blocks + blocks.div_ceil(4)) as i64).min(4 * self.ahead_blocks()),
            false => 0,
        };
    }

    /// The cleaner has gained so many blocks.
    pub(super) fn pay(&mut self, blocks: i64) {
        self.pace.debt = (self.pace.debt - blocks).max(-self.ahead_blocks());
        self.release_held();
    }

    /// Whether guests' data has to wait for the cleaner, or for a checkpoint. Where these find no space for themselves it does not: it is
    /// refused, like all guests' data on a full host.
    pub(super) fn is_behind(&self) -> bool {
        let owes = self.pace.debt > self.ahead_blocks() && self.is_cleaning_due();
        let may_wait = self.maintainers > 0 && !self.closing && self.latched.is_none();
        (owes || self.is_full()) && may_wait && !self.is_stuck_for_space()
    }

    /// Free segments that keep their space: what the log fills until checkpoints free the next ones, as far
    /// as the file may take it. To write where something was written before costs the file system less.
    pub(super) fn free_segments_kept(&self) -> usize {
        let room = self.allowed_bytes().saturating_sub(self.segments.occupied_bytes());
        let kept = room.min(2 * self.checkpoint_bytes()) / self.segments.bytes();
        (kept as usize).max(self.reserve_segments())
    }
}
