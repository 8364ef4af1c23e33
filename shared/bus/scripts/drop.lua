-- End an entry, and delete its request's record.
-- KEYS: stream, record
-- ARGV: consumer group, consumer, entry id
-- Returns 1 if the entry was the consumer's.
-- requires: ours
if not ours(ARGV[3]) then return 0 end
let_go(ARGV[3])
redis.call('UNLINK', KEYS[2])
return 1
