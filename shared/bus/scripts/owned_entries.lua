-- List the entries that the consumer owns.
-- KEYS: stream
-- ARGV: consumer group, consumer, entry id...
-- Returns {entry id...}.
-- requires: entries
local owned = {}
for i = 3, #ARGV do
  if owns(ARGV[i]) then owned[#owned + 1] = ARGV[i] end
end
return owned
