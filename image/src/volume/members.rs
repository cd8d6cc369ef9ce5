//! Who uses the layer of a volume: which of its queues have yet to leave it before all go on with the next.
//!
//! A queue is *parked* while its thread sleeps with nothing outstanding: it looks here before it starts
//! anything, so nobody waits for it. A parked queue has left by itself.

use std::collections::BTreeMap;
use std::task::Waker;

struct Member {
    waker: Waker,
    is_parked: bool,
    /// It may still use the layer that is being left.
    stays: bool,
}

/// Queues by number; a number is never used again.
#[derive(Default)]
pub(super) struct Members {
    list: BTreeMap<usize, Member>,
    added: usize,
    /// Those that have yet to leave; `None` while no switch is under way.
    staying: Option<usize>,
}

impl Members {
    /// Adds a queue that is woken by `waker`. It has nothing outstanding.
    pub(super) fn add(&mut self, waker: Waker) -> usize {
        self.added += 1;
        self.list.insert(self.added, Member { waker, is_parked: true, stays: false });
        self.added
    }

    /// Removes a queue; says whether the switch is complete by that.
    pub(super) fn remove(&mut self, number: usize) -> bool {
        let is_last = self.leave(number);
        self.list.remove(&number);
        is_last
    }

    /// A queue has nothing outstanding and will look here before it starts anything. Says whether the switch
    /// is complete by that.
    pub(super) fn park(&mut self, number: usize) -> bool {
        let is_last = self.leave(number);
        if let Some(member) = self.list.get_mut(&number) {
            member.is_parked = true;
        }
        is_last
    }

    /// The opposite of [`park`](Self::park).
    pub(super) fn unpark(&mut self, number: usize) {
        if let Some(member) = self.list.get_mut(&number) {
            member.is_parked = false;
        }
    }

    /// Begins a switch: wakes those who have to leave. Says whether there are none, so that it is complete.
    pub(super) fn begin(&mut self) -> bool {
        assert!(self.staying.is_none(), "one switch at a time");
        let mut staying = 0;
        for member in self.list.values_mut().filter(|member| !member.is_parked) {
            member.stays = true;
            staying += 1;
        }
        self.staying = Some(staying);
        self.list.values().filter(|member| member.stays).for_each(|member| member.waker.wake_by_ref());
        staying == 0
    }

    /// A queue has nothing more on the layer that is being left. Says whether the switch is complete by that:
    /// then [`end`](Self::end) it.
    pub(super) fn leave(&mut self, number: usize) -> bool {
        let Some(staying) = &mut self.staying else { return false };
        let Some(member) = self.list.get_mut(&number) else { return false };
        if !std::mem::take(&mut member.stays) {
            return false;
        }
        *staying -= 1;
        *staying == 0
    }

    /// Ends a switch: wakes everybody.
    pub(super) fn end(&mut self) {
        assert_eq!(self.staying.take(), Some(0), "all have left");
        self.list.values().for_each(|member| member.waker.wake_by_ref());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Members, the number of each of `count`, and how often it was woken.
    fn members(count: usize) -> (Members, Vec<usize>, Vec<Arc<Count>>) {
        let mut members = Members::default();
        let wakers: Vec<Arc<Count>> = (0..count).map(|_| Arc::default()).collect();
        let numbers = wakers.iter().map(|waker| members.add(Waker::from(Arc::clone(waker)))).collect();
        (members, numbers, wakers)
    }

    fn woken(wakers: &[Arc<Count>]) -> Vec<usize> {
        wakers.iter().map(|waker| waker.0.load(Ordering::Relaxed)).collect()
    }

    #[test]
    fn the_last_to_leave_completes_the_switch() {
        let (mut members, numbers, wakers) = members(3);
        numbers.iter().for_each(|&number| members.unpark(number));
        assert!(!members.begin());
        assert_eq!(woken(&wakers), [1, 1, 1]);
        assert!(!members.leave(numbers[1]));
        assert!(!members.leave(numbers[1]), "it counts once");
        assert!(!members.leave(numbers[0]));
        assert!(members.leave(numbers[2]));
        members.end();
        assert_eq!(woken(&wakers), [2, 2, 2]);
        assert!(!members.begin(), "all of them may use the next layer");
    }

    #[test]
    fn nobody_waits_for_who_sleeps_or_is_gone() {
        let (mut members, numbers, wakers) = members(4);
        assert!(members.begin(), "nobody has started anything");
        members.end();
        numbers.iter().for_each(|&number| members.unpark(number));
        assert!(!members.park(numbers[0]));
        assert!(!members.begin());
        assert_eq!(woken(&wakers), [1, 2, 2, 2]);
        assert!(!members.park(numbers[1]), "it went to sleep meanwhile");
        let late = members.add(Waker::noop().clone());
        members.unpark(late);
        assert!(!members.remove(late), "it came after the switch had begun");
        assert!(!members.leave(numbers[2]));
        assert!(members.remove(numbers[3]));
        members.end();
        assert_eq!(woken(&wakers), [2, 3, 3, 2]);
    }

    #[test]
    fn who_wakes_up_during_a_switch_is_not_waited_for() {
        let (mut members, numbers, _) = members(2);
        members.unpark(numbers[0]);
        assert!(!members.begin());
        members.unpark(numbers[1]);
        assert!(!members.leave(numbers[1]), "it had nothing there to leave");
        assert!(members.leave(numbers[0]));
        members.end();
        assert!(!members.begin());
        assert!(!members.leave(numbers[1]) && members.leave(numbers[0]), "now it has");
    }
}
