//! What every engine on host files promises: the same tests over io_uring, with and without what
//! newer kernels offer and with queues that are far too small, and over the blocking engine.
#![allow(clippy::unwrap_used, reason = "tests")]

mod engines;
mod lifetime;
mod names;
mod space;
mod transfers;
mod waking;

macro_rules! over_all_engines {
    ($($test:ident in $module:ident),* $(,)?) => {
        mod uring {
            $(#[test] fn $test() { crate::$module::$test(crate::engines::uring); })*
        }
        mod uring_coop_taskrun {
            $(#[test] fn $test() { crate::$module::$test(crate::engines::uring_coop_taskrun); })*
        }
        mod uring_old_kernel {
            $(#[test] fn $test() { crate::$module::$test(crate::engines::uring_old_kernel); })*
        }
        mod uring_tiny {
            $(#[test] fn $test() { crate::$module::$test(crate::engines::uring_tiny); })*
        }
        mod blocking {
            $(#[test] fn $test() { crate::$module::$test(crate::engines::blocking); })*
        }
    };
}

over_all_engines! {
    reads_what_was_written in transfers,
    moves_pieces_in_order in transfers,
    resumes_more_pieces_than_one_call_takes in transfers,
    honours_what_is_done_already in transfers,
    moves_no_more_than_it_is_to in transfers,
    read_ends_at_end_of_file in transfers,
    nothing_is_moved_for_no_memory in transfers,
    thousands_are_in_flight in transfers,
    misaligned_direct_transfer_fails_or_is_right in transfers,
    write_to_read_only_file_fails in transfers,
    offset_beyond_every_file_fails in transfers,
    reports_tokens_and_counts in transfers,
    allocates in space,
    allocation_without_space_fails in space,
    punched_range_reads_zero in space,
    truncates in space,
    syncs in space,
    device_is_a_file_of_fixed_size in space,
    renames in names,
    unlinks in names,
    syncs_directory in names,
    bad_names_fail in names,
    deadline_ends_the_wait in waking,
    wake_before_the_wait_is_kept in waking,
    wake_of_a_sleeper_arrives in waking,
    no_wake_is_lost in waking,
    watched_descriptor_ends_the_wait in waking,
    watch_is_replaced_and_ended in waking,
    completion_ends_the_wait in waking,
    drop_with_operations_in_flight in lifetime,
    drop_before_anything_was_started in lifetime,
    lock_goes_with_the_last_handle in lifetime,
    lock_stays_with_an_operation in lifetime,
    more_files_than_the_table_holds in lifetime,
}
