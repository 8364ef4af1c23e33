-- Move an entry to the quarantine.
-- KEYS: stream, quarantine
-- ARGV: consumer group, consumer, entry id, length of the quarantine, attempts, reason
-- Returns 1 if the consumer owned the entry.
-- requires: entries
if not owns(ARGV[3]) then return 0 end
quarantine(ARGV[3], KEYS[2], ARGV[4], ARGV[6], ARGV[5])
ack(ARGV[3])
return 1
