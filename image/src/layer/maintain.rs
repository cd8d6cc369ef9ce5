//! Background work of an open layer: periodic syncs, checkpoints, cleaning, giving space back.
//!
//! One thread runs [`Layer::maintain`]. A sync and a checkpoint happen by themselves after a
//! bounded time and amount of writing, so that what a crash can cost is bounded even for a guest
//! that never flushes.

use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::task::Poll;

use super::core::Core;
use super::device::Layer;
use super::driver::Driver;
use super::waiter::Result;
use crate::error::ImageError;
use futures_util::future::join;
use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::device::DeviceError;
use sapwood_blockdev::engine::{Engine, Op, Time};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::StorageFile;
use sapwood_blockdev::units::{BLOCK_SIZE, FileOffset};

/// Pause after background work has failed, for example because the host is full.
const RETRY_PAUSE: Time = Time::from_secs(1);

/// What background work is due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Due {
    sync: bool,
    checkpoint: bool,
}

impl Core {
    /// Whether a checkpoint would shorten a recovery.
    fn is_checkpoint_wanted(&self) -> bool {
        self.log.guest_sequence > self.checkpoint_sequence
    }

    pub(super) fn is_log_long(&self) -> bool {
        self.log.bytes_since_checkpoint >= self.checkpoint_bytes() && self.is_checkpoint_wanted()
    }

    /// Whether a checkpoint is due for its size, whatever the time.
    pub(super) fn is_checkpoint_due(&self) -> bool {
        self.is_log_long() || self.is_map_dirty()
    }

    /// What is due at `now`.
    fn due(&self, now: Time) -> Due {
        if self.latched.is_some() {
            return Due::default();
        }
        let old = now >= self.checkpointed_at + self.tuning.checkpoint_interval;
        Due {
            sync: self.unsynced_since().is_some_and(|since| now >= since + self.tuning.sync_interval),
            checkpoint: self.is_checkpoint_due()
                || (old && self.is_checkpoint_wanted())
                || self.is_freeing_due(now),
        }
    }

    /// When something becomes due if nothing else happens. A sync may become due, by a write to
    /// come, before a checkpoint does, so that nobody has to wake a maintenance that sleeps for one.
    fn next_due(&self, now: Time) -> Option<Time> {
        if self.latched.is_some() {
            return None;
        }
        let sync = self.unsynced_since().map(|since| since + self.tuning.sync_interval);
        let checkpoint =
            self.is_checkpoint_wanted().then(|| self.checkpointed_at + self.tuning.checkpoint_interval);
        let checkpoint = checkpoint.map(|due| due.min(now + self.tuning.sync_interval));
        sync.into_iter().chain(checkpoint).chain(self.next_freeing()).min()
    }

    /// Wakes the maintenance when the log has become long, or when something was written at all
    /// since it went to sleep without a deadline.
    pub(super) fn wake_maintenance_if_due(&mut self) {
        let clean = self.pace.idle && self.is_cleaning_due();
        let due =
            self.is_log_long() || self.is_map_dirty() || self.is_short_of_space() || self.is_full() || clean;
        if due || self.maintenance_idle {
            self.maintenance_idle = false;
            self.wake_maintenance();
        }
    }
}

impl<E: Engine> Layer<E> {
    /// Does the background work until [`close`](Self::close). To be run by one thread, which may
    /// have other things to do on the same reactor.
    pub async fn maintain(self: Arc<Self>, io: Io<E>) {
        if self.is_read_only() {
            return;
        }
        self.core().maintainers += 1;
        let driver = Driver::new(Arc::clone(&self), io);
        // Beside each other, so that guests who wait for the cleaner do not wait for checkpoints.
        join(driver.keep_durable(), driver.keep_clean()).await;
        driver.retire().await;
        let mut core = self.core();
        core.maintainers -= 1;
        core.release_held();
        core.wake_maintenance();
    }

    /// Makes a checkpoint now.
    ///
    /// # Errors
    /// What the storage says.
    pub async fn checkpoint(self: &Arc<Self>, io: &Io<E>) -> std::result::Result<(), ImageError> {
        self.on_driver(io, async |driver| driver.checkpoint(None, false).await).await
    }

    /// Empties the segment that has most to gain from it; says whether there was one.
    ///
    /// # Errors
    /// What the storage says.
    pub async fn clean(self: &Arc<Self>, io: &Io<E>) -> std::result::Result<bool, ImageError> {
        self.on_driver(io, async |driver| {
            driver.open_lanes().await?;
            driver.clean_best().await
        })
        .await
    }

    /// Ends background work, makes everything durable in a checkpoint that leaves nothing to
    /// replay, and gives unused space back. Queues must have been drained; afterwards the layer
    /// can only be read.
    ///
    /// # Errors
    /// What the storage says; the layer must then be recovered when it is next opened, which
    /// happens by itself.
    pub async fn close(self: &Arc<Self>, io: &Io<E>) -> std::result::Result<(), ImageError> {
        if self.is_read_only() {
            return Ok(());
        }
        {
            let mut core = self.core();
            core.closing = true;
            core.wake_maintenance();
        }
        poll_fn(|cx| {
            let mut core = self.core();
            if core.maintainers == 0 {
                return Poll::Ready(());
            }
            core.maintenance_wakers.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
        self.on_driver(io, async |driver| driver.close().await).await
    }

    pub(super) async fn on_driver<T>(
        self: &Arc<Self>,
        io: &Io<E>,
        f: impl AsyncFnOnce(&Driver<E>) -> Result<T>,
    ) -> std::result::Result<T, ImageError> {
        let driver = Driver::new(Arc::clone(self), io.clone());
        let result = f(&driver).await;
        driver.retire().await;
        result.map_err(|error| ImageError::new(self.path(), error))
    }
}

impl<E: Engine> Driver<E> {
    /// Waits until something is due, but not before a time; `None` when the layer closes.
    async fn await_due(&self, not_before: Time) -> Option<Due> {
        let mut timer = None;
        poll_fn(|cx| {
            let now = self.io.now();
            let mut core = self.layer.core();
            if core.closing {
                return Poll::Ready(None);
            }
            let due = core.due(now);
            if due != Due::default() && now >= not_before {
                return Poll::Ready(Some(due));
            }
            let until = if due == Due::default() { core.next_due(now) } else { Some(not_before) };
            core.maintenance_idle = until.is_none();
            core.maintenance_wakers.push(cx.waker().clone());
            drop(core);
            if let Some(until) = until {
                let sleep = timer.insert(Box::pin(self.io.sleep_until(until.max(not_before))));
                if sleep.as_mut().poll(cx).is_ready() {
                    cx.waker().wake_by_ref();
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Syncs and makes checkpoints when they are due, until the layer closes.
    async fn keep_durable(&self) {
        let mut not_before = Time::ZERO;
        while let Some(due) = self.await_due(not_before).await {
            if let Err(error) = self.work(due).await {
                not_before = self.pause_after(error);
            }
        }
    }

    /// Cleans when that is due, until the layer closes.
    async fn keep_clean(&self) {
        let mut not_before = Time::ZERO;
        let mut scratch = AlignedBuf::zeroed(0);
        while self.await_cleaning(not_before).await {
            if let Err(error) = self.clean_some(&mut scratch).await {
                not_before = self.pause_after(error);
            }
        }
    }

    /// Says that background work has failed, and when it may be tried again.
    fn pause_after(&self, error: DeviceError) -> Time {
        log::warn!("{}: background work failed: {error}", self.layer.path().display());
        self.io.now() + RETRY_PAUSE
    }

    async fn work(&self, due: Due) -> Result {
        if due.checkpoint {
            self.checkpoint(None, false).await?;
        } else if due.sync {
            self.flush().await?;
        }
        let kept = self.layer.core().free_segments_kept();
        self.punch_free(kept, 0).await
    }

    /// Waits until there is something to clean, but not before a time; `false` when the layer closes.
    async fn await_cleaning(&self, not_before: Time) -> bool {
        let mut timer = None;
        poll_fn(|cx| {
            let mut core = self.layer.core();
            if core.closing {
                return Poll::Ready(false);
            }
            let early = self.io.now() < not_before;
            core.pace.idle = !core.is_cleaning_due();
            if !core.pace.idle && !early {
                return Poll::Ready(true);
            }
            core.maintenance_wakers.push(cx.waker().clone());
            drop(core);
            if early {
                let sleep = timer.insert(Box::pin(self.io.sleep_until(not_before)));
                if sleep.as_mut().poll(cx).is_ready() {
                    cx.waker().wake_by_ref();
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Empties the best segments, as long as that is wanted.
    async fn clean_some(&self, scratch: &mut AlignedBuf) -> Result {
        let short = self.layer.core().is_short_of_space();
        if short {
            return self.clean_best().await.map(drop);
        }
        self.open_lanes().await?;
        let victims = self.choose_victims();
        if victims.is_empty() {
            self.layer.core().note_fruitless();
        }
        for segment in victims {
            if !self.layer.core().is_cleaning_due() {
                break;
            }
            self.clean_segment(segment, None, scratch).await?;
        }
        Ok(())
    }

    /// Empties the segment that has most to gain from it; says whether there was one.
    async fn clean_best(&self) -> Result<bool> {
        for segment in self.choose_victims() {
            if self.clean_segment(segment, None, &mut AlignedBuf::zeroed(0)).await? {
                return Ok(true);
            }
        }
        self.layer.core().note_fruitless();
        Ok(false)
    }

    async fn close(&self) -> Result {
        let unwritten = self.close_lanes().await?;
        // What the first one retires the second one frees; then both slots name the same map.
        self.checkpoint(None, true).await?;
        self.checkpoint(None, true).await?;
        for range in unwritten {
            self.punch(range).await?;
        }
        self.give_back().await?;
        self.layer.core().latched.get_or_insert(DeviceError::Latched);
        Ok(())
    }

    /// Gives back all space beyond the data and the log's end, but for what the next session may need.
    async fn give_back(&self) -> Result {
        let (ahead, size, kept) = {
            let mut core = self.layer.core();
            if let Some(spare) = core.log.spare.take() {
                core.segments.unchoose(spare);
            }
            core.segments.reap();
            let main = core.log.head.main();
            core.log.opened = false;
            let kept = core.kept_when_closed().map(|count| core.segments.first_free(count));
            let count = if kept.is_none() { core.segments.trim() } else { core.segments.count() };
            let start = core.segments.offset(main.segment).0;
            let tail = start + u64::from(main.block) * BLOCK_SIZE..start + core.segments.bytes();
            // The log's next segment stays, maybe as a hole.
            let next = core.segments.offset(main.next_segment).0;
            ([tail, next..next + core.segments.bytes()], core.segments.offset(count).0, kept)
        };
        for range in ahead.into_iter().filter(|_| kept.is_none()) {
            self.punch(range).await?;
        }
        let kept = kept.unwrap_or_default();
        self.punch_free(0, kept.last().map_or(0, |last| last + 1)).await?;
        for segment in kept {
            let range = {
                let core = self.layer.core();
                let start = core.segments.offset(segment).0;
                start..start + core.segments.bytes()
            };
            // It may be a hole. What was given back above is room for it; if not, there is less to begin with.
            let _ = self.reserve(std::iter::once(range).collect()).await;
        }
        if !self.layer.file().is_device() {
            self.io.run(Op::Truncate { file: self.layer.file(), size }).await.result?;
        }
        self.sync_file().await
    }

    /// Gives the space of free segments from number `from` on back to the host, but for the first `keep`.
    async fn punch_free(&self, keep: usize, from: u32) -> Result {
        loop {
            let (segment, range) = {
                let mut core = self.layer.core();
                let Some(segment) = core.segments.start_punch(keep, from) else { return Ok(()) };
                let start = core.segments.offset(segment).0;
                (segment, start..start + core.segments.bytes())
            };
            let result = self.punch(range).await;
            let given_back = matches!(result, Ok(true));
            self.layer.core().segments.punched(segment, given_back);
            if !result? {
                return Ok(());
            }
        }
    }

    /// Gives the space of a range back; says whether the file system or device can.
    async fn punch(&self, range: std::ops::Range<u64>) -> Result<bool> {
        if range.is_empty() {
            return Ok(true);
        }
        let len = range.end - range.start;
        let file = self.layer.file();
        // Nothing reads it before it is written again, or believes what it reads.
        let discard = Op::Discard { file: file.clone(), offset: FileOffset(range.start), len };
        match self.io.run(discard).await.result {
            Ok(_) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                file.note_no_space_back();
                Ok(false)
            }
            Err(errno) => Err(errno.into()),
        }
    }
}
