//! Without the counting allocator nothing is counted, and nobody is told zero.

use hearth_memory::heap;

#[test]
fn a_counter_that_is_not_installed_says_so() {
    heap::reset_peak();
    assert_eq!((heap::current(), heap::peak()), (None, None));
}
