-- Claim entries that are pending under the consumer's own name although it does not work on them.
-- KEYS: stream
-- ARGV: consumer group, consumer, entry id...
-- Returns {{entry id, attempts, fields}...}.
-- requires: take_over
local taken = {}
for i = 3, #ARGV do
  take_over(redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2]), taken)
end
return taken
