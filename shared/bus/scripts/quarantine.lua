-- Move an entry to the quarantine.
-- KEYS: stream, quarantine
-- ARGV: consumer group, consumer, entry id, length of the quarantine, attempts, reason
-- Returns 1 if the entry was the consumer's.
-- requires: ours
if not ours(ARGV[3]) then return 0 end
keep(ARGV[3], KEYS[2], ARGV[4], ARGV[6], ARGV[5])
let_go(ARGV[3])
return 1
