-- Claim entries that are pending under the consumer's own name although no reply has delivered them to it.
-- KEYS: stream
-- ARGV: consumer group, consumer, entry id...
-- Returns {{entry id, attempts, fields}...}.
-- requires: claim_entries
local taken = {}
for i = 3, #ARGV do
  claim_entries(redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2]), taken)
end
return taken
